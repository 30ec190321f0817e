"""POST /v1/compress, and `truncate` of requests with texts: against all subsets of the sentences, over the colours of
tests/service/conftest.py. Its text graph reads 12 tokens; a full stop is a word without a colour."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest

from calmclip.models.bundle.manifest import MANIFEST
from calmclip.service.settings import Limits, Settings
from tests.asking import b64, metric

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
LINES = ["Blue.", "A thing.", "Red red red.", "Green green.", "A photo of a thing.", "Yellow."]
TEXT = " ".join(LINES)  # 2 + 3 + 4 + 3 + 6 + 2 = 20 tokens
CONTEXT = 12


def tokens(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


def vector(words: list[str]) -> np.ndarray:
    total = np.sum([COLOURS.get(word, (0, 0, 0)) for word in words], axis=0)
    return total / max(np.linalg.norm(total), 1e-9)


def windows(text: str, stride: int = CONTEXT) -> list[list[str]]:
    words = tokens(text)
    starts = range(0, max(1, len(words) - CONTEXT + stride), stride)
    return [words[start : start + CONTEXT] for start in starts]


def mean(text: str, stride: int = CONTEXT) -> np.ndarray:
    parts = windows(text, stride)
    total = np.average([vector(part) for part in parts], axis=0, weights=[len(part) for part in parts])
    return total / np.linalg.norm(total)


def compress(client, **body):
    answer = client.post("/v1/compress", json={"texts": [TEXT]} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("budget", [8, 10, 12, 15, None])
def test_the_answer_is_nearly_the_best_of_all_subsets(client, budget):
    """At least .99 of the best cosine."""
    most = budget or CONTEXT
    subsets = [part for size in range(1, 6) for part in combinations(range(6), size)]
    near = {part: vector(tokens(" ".join(LINES[i] for i in part))) @ mean(TEXT) for part in subsets
            if len(tokens(" ".join(LINES[i] for i in part))) <= most}  # fmt: skip
    answer = compress(client, **({"budget": budget} if budget else {}))
    (text,) = answer["texts"]
    assert answer["model"] == "colours-int8"
    assert text["cosine"] == pytest.approx(near[tuple(text["kept"])], abs=1e-5)
    assert text["cosine"] >= 0.99 * max(near.values())
    assert text["text"] == " ".join(LINES[i] for i in text["kept"])
    assert text["tokens"] == len(tokens(text["text"])) <= most
    assert (text["tokens_before"], text["sentences"], text["cut"]) == (20, 6, False)
    assert text["ratio"] == pytest.approx(text["tokens"] / 20, abs=1e-6)


def test_a_text_within_the_budget_comes_back_and_texts_keep_their_order(client):
    first, second, third = compress(client, texts=[TEXT, "Red.\n\n  Blue", TEXT], budget=12)["texts"]
    assert first == third
    assert (second["text"], second["cosine"], second["ratio"], second["kept"]) == ("Red.\n\n  Blue", 1, 1, [0, 1])


def test_a_long_sentence_is_cut_and_the_answer_says_so(client):
    (text,) = compress(client, texts=["red " * 30], budget=9)["texts"]
    assert (text["text"], text["cut"], text["tokens"], text["kept"]) == (("red " * 9).strip(), True, 9, [0])


def test_requests_at_once_have_the_answers_of_requests_alone(limited):
    bodies = [{"texts": [" ".join(LINES[i:] + LINES[:i])], "budget": budget} for i in range(6) for budget in (8, 11)]

    def ask(body: dict[str, object]) -> object:
        return limited.post("/v1/compress", json=body).json()

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(ask, bodies)] == alone
    assert metric(limited, 'calmclip_requests_total{model="colours-int8",outcome="ok",task="compress"}') >= 24


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"texts": []}, 422, "invalid-request", "at least 1 item"),
        ({"texts": [""]}, 422, "invalid-request", "text 0 is empty"),
        ({"texts": "red"}, 422, "invalid-request", "texts"),
        ({"texts": [b64(b"")]}, 422, "invalid-request", "texts"),
        ({"texts": ["red"] * 5}, 422, "invalid-request", "5 texts were given; at most 4 are read at once"),
        ({"texts": ["red " * 30] * 2}, 422, "invalid-request", "240 characters; with compress at most 200 are read"),
        ({"texts": ["x" * 100_001]}, 422, "invalid-request", "100001 characters; with compress at most 200"),
        ({"budget": 7}, 422, "invalid-request", "greater than or equal to 8"),
        ({"budget": 8193}, 422, "invalid-request", "less than or equal to 8192"),
        ({"budget": 8.5}, 422, "invalid-request", "budget"),
        ({"model": "none"}, 404, "model-not-found", "none"),
        ({"model": "words"}, 409, "task-not-served", "compress"),
        ({"labels": []}, 422, "invalid-request", "labels"),
    ],
)
def test_wrong_requests_are_problems(limited, changed, status, slug, says):
    answer = limited.post("/v1/compress", json={"texts": [TEXT]} | changed)
    assert answer.status_code == status, answer.text
    assert answer.json()["type"] == f"/problems/{slug}"
    assert says in answer.text


def test_the_deadline_is_kept(client):
    answer = client.post("/v1/compress", json={"texts": [TEXT]}, headers={"X-Request-Deadline-Ms": "0.01"})
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline-exceeded")


@pytest.fixture(scope="module")
def limited(serve, bundle_maker, tmp_path_factory):
    """A service with low limits and no cache of texts, with the bundle `words`, which does not embed."""
    folder = tmp_path_factory.mktemp("limited")
    bundle_maker(folder / "bundles", "colours-int8")
    file = bundle_maker(folder / "bundles", "words").directory / MANIFEST
    file.write_text(file.read_text().replace('"embed",', "").replace(', "embed"', ""))
    paths = {"bundles_dir": folder / "bundles", "data_dir": folder / "data"}
    limits = Limits(texts=4, long_characters=200)
    with serve(Settings(**paths, load="colours-int8,words", threads=1, text_cache=0, limits=limits)) as client:
        yield client


END = [*tokens(TEXT)[: CONTEXT - 1], "."]
HOW = [
    ({"truncate": "end"}, vector(END)),
    ({"truncate": True}, vector(END)),
    ({"truncate": "chunk"}, mean(TEXT)),
    ({"truncate": "chunk", "stride": 4}, mean(TEXT, 4)),
    ({"truncate": "chunk", "pooling": "max"}, np.max([vector(part) for part in windows(TEXT)], axis=0)),
]


@pytest.mark.parametrize(("fields", "want"), HOW, ids=[str(fields) for fields, _ in HOW])
def test_an_embed_request_chooses_in_both_formats_and_as_a_form(client, fields, want):
    want = want / np.linalg.norm(want)
    ours = client.post("/v1/embed", json={"inputs": [{"text": "red"}, {"text": TEXT}], **fields}).json()["embeddings"]
    theirs = client.post("/v1/embeddings", json={"model": "colours-int8", "input": ["red", TEXT], **fields}).json()
    form = client.post("/v1/embed", files=[("text", (None, "red")), ("text", (None, TEXT)),
                                           *((k, (None, str(v).lower())) for k, v in fields.items())])  # fmt: skip
    for rows in (ours, [row["embedding"] for row in theirs["data"]], form.json()["embeddings"]):
        assert np.array(rows) == pytest.approx(np.array([(1, 0, 0), want]), abs=1e-5)


def test_compress_embeds_what_the_endpoint_answers(client):
    (text,) = compress(client)["texts"]
    long, short = (
        client.post("/v1/embed", json={"inputs": [{"text": words}], "truncate": "compress"}).json()["embeddings"]
        for words in (TEXT, text["text"])
    )
    assert long == [pytest.approx(short[0], abs=1e-6)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "has 20 tokens; this model reads at most 12"),
        ({"truncate": "none"}, "has 20 tokens; this model reads at most 12"),
        ({"truncate": False}, "has 20 tokens; this model reads at most 12"),
        ({"truncate": "start"}, "truncate"),
        ({"truncate": "end", "stride": 3}, "need truncate = chunk"),
        ({"stride": 3}, "need truncate = chunk"),
        ({"truncate": "chunk", "stride": 13}, "stride is 13; expected 1 to 12 tokens"),
        ({"truncate": "chunk", "pooling": "sum"}, "pooling"),
    ],
)
def test_other_choices_are_refused(client, fields, says):
    client.post("/v1/embed", json={"inputs": [{"text": TEXT}], "truncate": "end"})  # its row must not answer these
    for status, answer in (
        (422, client.post("/v1/embed", json={"inputs": [{"text": TEXT}], **fields})),
        (400, client.post("/v1/embeddings", json={"model": "colours-int8", "input": TEXT, **fields})),
    ):
        assert answer.status_code == status, answer.text
        assert says in answer.text


def test_items_and_queries_choose(client):
    client.put("/v1/collections/long", json={})
    path = "/v1/collections/long"
    items = [{"id": "whole", "text": TEXT}, {"id": "blue", "text": "blue"}]
    assert client.post(f"{path}/items", json={"items": items}).status_code == 422
    assert client.post(f"{path}/items", json={"items": items, "truncate": "chunk"}).json()["count"] == 2
    for how, want in (("chunk", 1.0), ("end", vector(END) @ mean(TEXT))):
        (hit,) = client.post(f"{path}/search", json={"query": {"text": TEXT}, "truncate": how, "top_k": 1}).json()[
            "hits"
        ]
        assert (hit["id"], hit["score"]) == ("whole", pytest.approx(want, abs=1e-5))
    assert "20 tokens" in client.post(f"{path}/search", json={"query": {"text": TEXT}}).text
    client.delete(path)


def test_the_characters_of_long_texts_are_limited(limited):
    text = "red " * 60
    for path, status, body in (
        ("/v1/embed", 422, {"inputs": [{"text": text}]}),
        ("/v1/embeddings", 400, {"model": "colours-int8", "input": text}),
    ):
        for how in ("chunk", "compress"):
            answer = limited.post(path, json={**body, "truncate": how})
            assert answer.status_code == status
            assert f"240 characters; with {how} at most 200 are read at once" in answer.text
        assert limited.post(path, json={**body, "truncate": "end"}).status_code == 200
