"""Expected values: the vector of a text is the sum of its words' colours (conftest.py), so the cosine of "a red and
blue thing" and a red picture is 1 / sqrt(2); without "red" it is 0, without "blue" 1."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from calmclip.models.bundle.manifest import MANIFEST
from calmclip.service.settings import Limits, Settings
from tests.asking import b64, metric, raw

CAPTION = "a red and blue thing"
HALF = math.sqrt(0.5)


def test_words_of_a_caption_in_every_shape_of_the_body(client, picture):
    red = picture("red")
    answers = [
        client.post("/v1/explain", json={"image": b64(red), "caption": CAPTION, "threshold": -0.25}),
        client.post("/v1/explain", files={"image": red}, data={"caption": CAPTION, "threshold": -0.25}),
        client.post("/v1/explain", params={"caption": CAPTION, "threshold": -0.25}, **raw(red)),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert "infer;dur=" in answers[0].headers["server-timing"]
    answer = answers[0].json()
    words = answer.pop("words")
    assert [(word["text"], word["start"], word["end"], word["flagged"]) for word in words] == [
        ("a", 0, 1, False), ("red", 2, 5, False), ("and", 6, 9, False), ("blue", 10, 14, True),
        ("thing", 15, 20, False),
    ]  # fmt: skip
    assert [word["contribution"] for word in words] == pytest.approx([0, HALF, 0, HALF - 1, 0], abs=1e-6)
    assert answer == {
        "model": "colours-int8", "method": "leave_one_out", "threshold": -0.25, "lowest": 3, "flagged": ["blue"],
        "score": pytest.approx(HALF, abs=1e-6), "clip_score": pytest.approx(2.5 * HALF, abs=1e-6),
        "f_score": pytest.approx(2.5 * (2 * HALF - 1), abs=1e-6),
    }  # fmt: skip


def test_threshold_offsets_and_function_words(client, picture):
    """Offsets count code points, of which a character outside of Unicode's first plane is one."""
    red = raw(picture("red"))
    lower = client.post("/v1/explain", params={"caption": CAPTION, "threshold": -0.3}, **red).json()
    assert (lower["flagged"], lower["lowest"], lower["threshold"]) == ([], 3, -0.3)
    caption = "🎈 red — blue"
    words = client.post("/v1/explain", params={"caption": caption}, **red).json()["words"]
    assert [caption[word["start"] : word["end"]] for word in words] == ["🎈", "red", "blue"]
    only = client.post("/v1/explain", params={"caption": "of the"}, **red).json()
    assert (only["lowest"], only["flagged"], only["f_score"]) == (None, [], 0.0)


def test_requests_at_once_have_the_answers_of_requests_alone(limited, picture):
    """The service keeps no row of a text, so every request embeds its caption."""
    shown = [picture(*colours) for colours in (["red"], ["yellow"], ["red", "blue", "green", "green"])]
    captions = [CAPTION, "yellow", "a photo of a white thing", "green red blue white yellow"]
    bodies = [{"image": b64(image), "caption": caption} for image, caption in product(shown, captions)] * 2
    texts = 6 * (6 + 1 + 7 + 6)  # nothing is left of "yellow" without its word

    def count(what: str, graph: str) -> float:
        return metric(limited, f'calmclip_batch_size_{what}{{graph="{graph}",model="colours-int8"}}')

    def ask(body: dict[str, object]) -> object:
        return limited.post("/v1/explain", json=body).json()

    alone = [ask(body) for body in bodies]
    before = [count("sum", "image"), count("count", "image"), count("sum", "text")]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, bodies))
    assert together == alone
    assert count("sum", "text") - before[2] == texts
    assert count("sum", "image") - before[0] == len(bodies) > count("count", "image") - before[1]  # some shared a run


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"caption": ""}, 422, "invalid-request", "has no word"),
        ({"caption": " ... "}, 422, "invalid-request", "has no word"),
        ({"caption": None}, 422, "invalid-request", "caption"),
        ({"caption": ["red"]}, 422, "invalid-request", "caption"),
        ({"caption": "x " * 501}, 422, "invalid-request", "the caption has 1002 characters; at most 1000"),
        ({"caption": "a b c d e f g"}, 422, "invalid-request", "the caption has 7 words; at most 6"),
        ({"caption": "...,,,!!!???;;;:::---" * 3 + "red"}, 200, "", "red"),
        ({"threshold": -1.5}, 422, "invalid-request", "threshold"),
        ({"method": "nothing"}, 422, "invalid-request", "no method 'nothing'"),
        ({"method": "gradient"}, 409, "task-not-served", "no graph 'attribution'"),
        ({"colour": 1}, 422, "invalid-request", "colour"),
        ({"model": "nothing"}, 404, "model-not-found", "nothing"),
        ({"model": "words"}, 409, "task-not-served", "words"),
        ({"image": {"b64": ""}}, 415, "unsupported-image", ""),
        ({"image": b64(bytes(9000))}, 413, "image-too-large", "at most 8000"),
    ],
)
def test_wrong_requests_are_problems(limited, picture, changed, status, slug, says):
    answer = limited.post("/v1/explain", json={"image": b64(picture("red")), "caption": CAPTION} | changed)
    assert answer.status_code == status, answer.text
    assert answer.json().get("type", "/problems/") == f"/problems/{slug}"
    assert says in answer.text


def test_what_the_gradient_needs_is_said_and_what_works_instead(limited, picture):
    answer = limited.post("/v1/explain", params={"caption": CAPTION, "method": "gradient"}, **raw(picture("red")))
    assert answer.json()["known"] == ["leave_one_out"]
    assert "--attribution" in answer.json()["detail"]


def test_a_text_with_more_tokens_than_the_tower_reads(client, picture):
    answer = client.post("/v1/explain", json={"image": b64(picture("red")), "caption": "red " * 13})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/text-too-long")


def test_the_deadline_is_kept(client, picture):
    late = {"X-Request-Deadline-Ms": "0.01"}
    answer = client.post("/v1/explain", params={"caption": CAPTION}, **raw(picture("red"), **late))
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline-exceeded")


@pytest.fixture(scope="module")
def limited(serve, bundle_maker, tmp_path_factory):
    """A service with low limits and no cache of texts, over the bundle, `own`, to which a threshold was fitted, and
    `words`, which does not embed."""
    folder = tmp_path_factory.mktemp("limited")
    for name, changes in (
        ("colours-int8", {}),
        ("own", {"explain": {"fitted": {"leave_one_out": {"threshold": -0.5, "expected": 0.25}}}}),
        ("words", {"tasks": ["detect"]}),
    ):
        file = bundle_maker(folder / "bundles", name).directory / MANIFEST
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    limits = Limits(caption_words=6, image_bytes=8000)
    paths = {"bundles_dir": folder / "bundles", "data_dir": folder / "data"}
    with serve(Settings(**paths, load="colours-int8,own,words", threads=1, text_cache=0, limits=limits)) as client:
        yield client


def test_models_name_what_an_explain_request_gets(limited, picture):
    models = {model["name"]: model["explanation"] for model in limited.get("/v1/models").json()["models"]}
    usual = models["colours-int8"]
    assert models == {
        "colours-int8": {"methods": ["leave_one_out"], "threshold": usual["threshold"]},
        "own": {"methods": ["leave_one_out"], "threshold": -0.5},
        "words": None,
    }
    blue = {name: ask(limited, name, picture("red"))["words"][3] for name in ("colours-int8", "own")}
    # the caption's and the shorter one's vectors are (1, 0, 1) / sqrt(2) and (1, 0, 0)
    assert blue["colours-int8"]["margin"] == blue["colours-int8"]["contribution"]
    assert blue["own"]["margin"] == pytest.approx(HALF - 1 - 0.25 * math.sqrt(2 - 2 * HALF), abs=1e-6)
    assert [blue[name]["flagged"] for name in blue] == [usual["threshold"] > HALF - 1, False]
    assert ask(limited, "own", picture("red"), threshold=-0.45)["flagged"] == ["blue"]


def ask(limited, name, image, **more):
    answer = limited.post("/v1/explain", params={"caption": CAPTION, "model": name, **more}, **raw(image)).json()
    assert (answer["model"], answer["method"]) == (name, "leave_one_out")
    return answer
