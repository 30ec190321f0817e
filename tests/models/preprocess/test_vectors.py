"""Vectors in place of texts: what the graph gets, what is refused, in Python and on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.embedding import embedding_digest
from calmclip.models.bundle.manifest import VectorPreprocess
from calmclip.models.bundle.store import read
from calmclip.models.classifier import Classifier
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.vectors import Vector, VectorPreparer, label_rows
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.stored_classifier import ClassifierFolder, read_classifier
from calmclip.models.tasks import TASKS
from calmclip.models.tasks.embed import EmbedRequest
from tests.vectors import BLUE, DIM, MODEL, RED, SCALE, YELLOW, seal_bundle, softmax

PREPARER = VectorPreparer(VectorPreprocess(dim=3, model=MODEL))
HALF = 0.5**0.5


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return open_bundle(seal_bundle(tmp_path_factory.mktemp("vectors")).directory, threads=1)


@pytest.fixture
def red() -> np.ndarray:
    return np.full((8, 8, 3), (255, 0, 0), np.uint8)


def test_rows_become_unit_vectors_unless_the_bundle_says_no():
    rows = [[3, 0, 4], np.array([0, -2, 0], np.float16)]
    assert PREPARER.prepare(rows)["vectors"].tolist() == [pytest.approx([0.6, 0, 0.8]), [0, -1, 0]]
    plain = VectorPreparer(VectorPreprocess(dim=3, normalize=False, input="x"))
    feeds = plain.prepare(rows)
    assert [*feeds] == ["x"]
    assert feeds["x"].dtype == np.float32
    assert feeds["x"].tolist() == [[3, 0, 4], [0, -2, 0]]
    assert plain.prepare([[0, 0, 0]])["x"].tolist() == [[0, 0, 0]]
    tiny = PREPARER.prepare([[0, 1e-30, 0]])["vectors"]  # its square is 0 in float32
    assert tiny.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no vectors were given; expected at least one of 3 numbers"),
        ([[1, 2, 3], [1, 2]], f"vector 1 has 2 numbers; this bundle reads vectors of {MODEL} with 3 numbers"),
        ([[1, 2, 3, 4]], "vector 0 has 4 numbers"),
        ([[1, float("nan"), 3]], "vector 0: number 1 is nan; expected finite numbers of float32"),
        ([[1, 2, float("-inf")]], "vector 0: number 2 is -inf"),
        ([[1, 2, 1e39]], r"vector 0: number 2 is 1e\+39; expected finite numbers of float32"),
        ([[1, 2, 3], [0, 0, 0.0]], "vector 1 has the length 0 and no direction"),
        (["abc"], "vector 0 is no list of numbers"),
        ([[1, None, "x"]], "vector 0 is no list of numbers"),
        ([[[1, 2, 3]]], r"vector 0 has the shape \[1, 3\]; expected one row of numbers"),
        ([5], r"vector 0 has the shape \[\]"),
    ],
)
def test_each_fault_has_its_own_error(rows: list[object], says: str):
    with pytest.raises(BadRequest, match=f"^{says}"):
        PREPARER.prepare(rows)


def test_embed_takes_vectors_among_pictures_in_their_order(runner: Runner, red: np.ndarray):
    answer = runner.ask("embed", EmbedRequest([Vector(BLUE), red, Vector(YELLOW)]))
    assert answer.vectors == pytest.approx(np.array([[0, 0, 1], [1, 0, 0], [HALF, HALF, 0]]), abs=1e-6)
    assert answer.tokens == 0
    assert runner.embed(vectors=np.array([BLUE, RED]), images=[red]) == pytest.approx(np.eye(3)[[2, 0, 0]], abs=1e-6)


def test_a_bundle_of_vectors_serves_what_needs_no_texts(runner: Runner):
    assert runner.bundle.tasks == ("classify", "embed")  # rank, tag, explain and anomaly follow in bundles of texts
    for task in ("classify", "embed"):
        request = TASKS.get(task).example(
            runner.bundle, (Path(__file__).parents[3] / "export/samples/cat.jpg").read_bytes()
        )
        assert runner.ask(task, request)


@pytest.mark.parametrize("ask", [lambda r, red: r.embed(texts=["a"]), lambda r, red: r.classify(red, ["a"])])
def test_a_text_is_refused_with_what_the_bundle_reads(ask, runner: Runner, red: np.ndarray):
    says = rf"reads no texts, but vectors of {MODEL} with {DIM} numbers: send a `vector`.*--text-encoder"
    with pytest.raises(BadRequest, match=says):
        ask(runner, red)


def test_a_vector_is_refused_where_texts_are_read(bundle: Bundle, red: np.ndarray):
    runner, classifier = Runner(bundle), Classifier(("a",), label_vectors={"a": np.ones((1, DIM), np.float32)})
    for ask in (lambda: runner.embed(vectors=[RED]), lambda: runner.classify(red, classifier=classifier)):
        with pytest.raises(BadRequest, match="reads texts, and no vectors of another model"):
            ask()
    with pytest.raises(BadRequest, match="reads texts"):  # before a head with vectors of its own could ignore them
        bundle.classifier_for(classifier)


def test_classify_with_label_vectors_is_the_softmax_of_cosines(runner: Runner, red: np.ndarray):
    """Of several vectors of a label: the mean of their unit vectors, made a unit vector. (1, 0, 0) and (h, h, 0) with
    h = sqrt(1/2) have the mean direction at 22.5 degrees."""
    mixed = np.cos(np.pi / 8)
    ranking = runner.classify(red, classifier=Classifier(("mixed", "blue", "yellow"), label_vectors=label_rows(
        {"yellow": [YELLOW], "mixed": [RED, YELLOW], "blue": [BLUE]}
    )))  # fmt: skip
    assert [(r.label, r.index) for r in ranking] == [("mixed", 0), ("yellow", 2), ("blue", 1)]
    assert [r.cosine for r in ranking] == pytest.approx([mixed, HALF, 0], abs=1e-6)
    assert [r.score for r in ranking] == pytest.approx(softmax(SCALE * mixed, SCALE * HALF, 0), abs=1e-6)


def test_labels_select_some_of_a_classifier_with_vectors(runner: Runner, red: np.ndarray):
    classifier = Classifier(("a", "b", "c"), label_vectors=label_rows({"a": [BLUE], "b": [RED], "c": [YELLOW]}))
    assert [r.label for r in runner.classify(red, ["c", "a"], classifier=classifier)] == ["c", "a"]
    refused = {
        "the label 'd' has no label vectors": {"labels": ["a", "d"]},
        "none of the 1 labels has label vectors": {"labels": ["d"]},
        "leave out `templates`": {"templates": ["a {}"]},
        "leave out `descriptions`": {"descriptions": {"a": ["x"]}},
        "Leave out `attributes`": {"attributes": {"time": ["day", "night"]}},
    }
    for says, given in refused.items():
        with pytest.raises(BadRequest, match=says):
            runner.classify(red, classifier=classifier, **given)


def test_two_classifiers_of_the_same_labels_do_not_share_cached_rows(runner: Runner, red: np.ndarray):
    first, second = ({"a": [of_a], "b": [of_b]} for of_a, of_b in ((RED, BLUE), (BLUE, RED)))
    best = [
        next(iter(runner.classify(red, classifier=Classifier(("a", "b"), label_vectors=label_rows(v)))))
        for v in (first, second)
    ]
    assert [ranked.label for ranked in best] == ["a", "b"]


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        ({"a": [RED]}, "the label 'b' has no label vectors"),
        ({"a": [RED], "b": [BLUE], "c": [BLUE]}, "label vectors of 'c', which is none of the 2 labels"),
        ({"a": [RED], "b": [(1.0, 2.0)]}, "those of 'a' 4; expected as many"),
        (
            {"a": [RED, (1.0,)], "b": [BLUE]},
            r"label vectors of 'a' have \[1, 4\] numbers; expected vectors of one length",
        ),
        ({"a": [], "b": [BLUE]}, "label vectors of 'a' have no numbers"),
        ({"a": [(1.0, float("inf"))], "b": [BLUE]}, "label vectors of 'a', 0: number 1 is inf"),
    ],
)
def test_label_vectors_that_do_not_fit_are_refused(vectors, says: str):
    with pytest.raises(BadRequest, match=says):
        Classifier(("a", "b"), label_vectors=label_rows(vectors))


def test_a_stored_classifier_keeps_its_vectors_bit_by_bit(tmp_path: Path):
    rows = label_rows({"a": [RED, (1 / 3, 1e-7, 3e38, -1)], "b": [BLUE]})
    folder = ClassifierFolder(tmp_path)
    stored = folder.store("words", Classifier(("b", "a"), label_vectors=rows))
    for classifier in (
        read_classifier(tmp_path / "words.json").classifier,
        ClassifierFolder(tmp_path).get("words").classifier,
    ):
        assert classifier.labels == ("b", "a")
        assert {label: kept.tobytes() for label, kept in classifier.label_vectors.items()} == {
            label: kept.tobytes() for label, kept in rows.items()
        }
    assert folder.store("words", Classifier(("b", "a"), label_vectors=rows)).version == stored.version
    changed = label_rows({"a": [RED], "b": [BLUE]})
    assert folder.store("words", Classifier(("b", "a"), label_vectors=changed)).version == stored.version + 1
    folder.store("texts", Classifier(("b", "a")))
    assert "label_vectors" not in json.loads((tmp_path / "texts.json").read_text())  # an older calmclip reads it
    value = json.loads((tmp_path / "words.json").read_text())
    for wrong in ({"dim": 3}, {"data": "not base64"}, {"dim": 0}):
        value["label_vectors"]["a"] |= wrong
        (tmp_path / "words.json").write_text(json.dumps(value))
        with pytest.raises(BadRequest, match=r"words\.json is not a classifier"):
            read_classifier(tmp_path / "words.json")


def test_the_command_line_reads_arrays(runner: Runner, tmp_path: Path, capsys):
    directory, cat = runner.bundle.directory, str(Path(__file__).parents[3] / "export/samples/cat.jpg")
    files = {"row.npy": np.array(RED), "two.npz": None, "bank.npz": None}
    np.save(tmp_path / "row.npy", files["row.npy"])
    np.savez(tmp_path / "two.npz", np.array([BLUE, YELLOW]))
    np.savez(tmp_path / "bank.npz", ids=np.array(["x"]), vectors=np.array([BLUE]))
    np.savez(tmp_path / "labels.npz", **{"a cat": np.array([RED, YELLOW]), "sky": np.array(BLUE)})

    def run(*arguments: str) -> list[dict[str, object]]:
        assert main(["run", directory.name, *arguments, "--bundles", str(directory.parent), "--json"]) == 0
        answers: list[dict[str, object]] = json.loads(capsys.readouterr().out)["answers"]
        return answers

    wanted = {"row.npy": [[1, 0, 0]], "two.npz": [[0, 0, 1], [HALF, HALF, 0]], "bank.npz": [[0, 0, 1]]}
    for file, rows in wanted.items():
        answers = run("embed", "--vectors", str(tmp_path / file))
        assert [answer["embedding"] for answer in answers] == [pytest.approx(row, abs=1e-6) for row in rows]
    (answer,) = run("classify", cat, "--label-vectors", str(tmp_path / "labels.npz"))
    given = Classifier(("a cat", "sky"), label_vectors=label_rows({"a cat": [RED, YELLOW], "sky": [BLUE]}))
    ranking = runner.classify(cat, classifier=given)
    assert answer["classify"] == [{"label": r.label, "score": pytest.approx(r.score)} for r in ranking]
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.savez(tmp_path / "several.npz", a=np.ones(4), b=np.ones(4))
    refused = {"text.npy": "cannot be read", "words.npy": "expected rows of numbers", "several.npz": "'vectors'",
               "none.npy": "cannot be read"}  # fmt: skip
    for file, says in refused.items():
        command = [
            "run",
            directory.name,
            "embed",
            "--vectors",
            str(tmp_path / file),
            "--bundles",
            str(directory.parent),
        ]
        assert main(command) != 0
        assert says in capsys.readouterr().err


def test_check_bench_and_the_digest_know_the_kind(runner: Runner, tmp_path: Path, capsys):
    folder = str(runner.bundle.directory.parent)
    assert main(["check", "words-int8", "--bundles", folder]) == 0
    assert "text: text_embeds rows are unit vectors" in capsys.readouterr().out
    assert main(["bench", "words-int8", "--bundles", folder, "--rounds", "2"]) == 0
    digests = {
        embedding_digest(read(seal_bundle(tmp_path / str(place), **changed).directory).manifest)
        for place, changed in enumerate(({}, {"model": "another"}, {"normalize": False}))
    }
    assert len(digests | {runner.bundle.embedding_digest}) == 3
