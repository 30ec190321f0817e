"""Bundles under faults. The answers are worked out by hand: a row of the identity times a colour."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from calmclip.export.resilience import inject
from calmclip.export.resilience.faults import Faults
from calmclip.export.resilience.forms import HIGH, LOW
from calmclip.export.resilience.inject import ALL, Settings, Subject, Trial, cosines
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import DOMAIN
from calmclip.models.runner import open_bundle
from tests.export.resilience.conftest import COLOURS


def fault(tensor: int, place: int, bit: int) -> Faults:
    return Faults(np.array([tensor]), np.array([place]), np.array([bit]))


@pytest.fixture
def subject(runner, data) -> Subject:
    return Subject(runner, data, ["image"])


def test_a_flipped_sign_turns_the_vector_of_one_picture(subject: Subject):
    """[[-1, 0, 0], [0, 1, 0], [0, 0, 1]]: red is (-1, 0, 0), so its best label is green, and its cosine -1."""
    trial = subject.trial(fault(0, 0, 31))
    assert (trial.faults, trial.agreement, trial.accuracy) == (1, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert trial.cosine == pytest.approx((-1 + 1 + 1) / 3)
    again = subject.trial(fault(0, 0, 31))
    assert (again.agreement, again.cosine) == (trial.agreement, trial.cosine)


def test_a_number_that_grows_moves_a_vector_by_its_angle(subject: Subject):
    """Bit 30 of 0 is 2.0: row red becomes (1, 2, 0), whose cosine with red is 1 / sqrt(5), and whose label is green."""
    trial = subject.trial(fault(0, 1, 30))
    assert trial.agreement == pytest.approx(2 / 3)
    assert trial.cosine == pytest.approx((1 / np.sqrt(5) + 1 + 1) / 3, abs=1e-6)


def test_nan_disagrees_and_has_the_cosine_0(subject: Subject):
    """Bit 30 of 1.0 is infinity, and infinity times 0 is NaN: no picture has an answer."""
    trial = subject.trial(fault(0, 0, 30))
    assert (trial.agreement, trial.accuracy, trial.cosine, trial.refused) == (0, 0, 0, "")


def test_rows_without_an_answer():
    flipped = np.array([[3, 4], [np.nan, 1], [np.inf, 0], [0, 0], [-2, 0]], np.float32)
    clean = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    assert cosines(flipped, clean) == pytest.approx([0.6, 0, 0, 0, -1])


def test_a_vector_without_length_is_no_answer(subject: Subject):
    """Its logits are equal, and the first label would win."""
    vectors = np.array([[0, 0, 0], [0, 2, 0], [0, 0, 1]], np.float32)
    trial = subject._compared(inject._Answer(vectors, vectors), 1, "", 0.0)
    assert (trial.agreement, trial.accuracy, trial.cosine) == (pytest.approx(2 / 3),) * 3


def test_without_faults_all_answers_stay(subject: Subject):
    trial = subject.trial(Faults(*np.empty((3, 0), np.int64)))
    assert (trial.agreement, trial.cosine, trial.accuracy, trial.faults) == (1, 1, 1, 0)
    assert subject.clean.logits == pytest.approx(2 * np.eye(3))  # the head's scale


def test_faults_of_the_text_graph_move_labels(runner, data):
    """The word red has the vector (-1, 0, 0): the picture red is nearer to the other two, of which green is first."""
    subject = Subject(runner, data, ["text"], ["weight"])
    names = [tensor.name for tensor in subject.store.tensors]
    trial = subject.trial(fault(names.index("text/words"), 6, 31))
    assert trial.agreement == pytest.approx(2 / 3)
    assert trial.cosine == pytest.approx(1 / 3)  # of the labels
    lost = subject.trial(fault(names.index("text/words"), 6, 30))  # a label of NaN is compared with every picture
    assert (lost.agreement, lost.cosine) == (0, pytest.approx(2 / 3))
    both = Subject(runner, data, ["text", "image"])
    assert both.clean.vectors.shape == (6, 3)
    shared = both.trial(fault([tensor.name for tensor in both.store.tensors].index("image/matrix"), 0, 31))
    assert (shared.agreement, shared.cosine) == (1, pytest.approx(2 / 6))  # picture and label turn together


def test_an_operator_that_refuses_is_no_answer(colours, data, library):
    """QuantLinearToFloat takes no negative scale; its library says so when it loads the graph."""

    def quantized(graphs):
        graph = graphs["image"].graph
        product = next(node for node in graph.node if node.op_type == "MatMul")
        product.CopyFrom(helper.make_node("QuantizeLinear", ["mean", "x_scale", "x_zero"], ["codes"]))
        names = ["codes", "x_scale", "x_zero", "w", "w_scale", "b", "none"]
        graph.node.insert(2, helper.make_node("QuantLinearToFloat", names, ["row"], domain=DOMAIN, activation=0))
        arrays = {
            "x_scale": np.float32(1 / 255), "x_zero": np.uint8(0), "w": np.eye(3, dtype=np.int8),
            "w_scale": np.ones(3, np.float32), "b": np.zeros(3, np.float32), "none": np.zeros(1, np.float32),
        }  # fmt: skip
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        graph.initializer.remove(next(t for t in graph.initializer if t.name == "matrix"))
        graphs["image"].opset_import.append(helper.make_opsetid(DOMAIN, 1))

    subject = Subject(open_bundle(colours("codes", quantized), threads=1, ops="required"), data, ["image"])
    names = [tensor.name for tensor in subject.store.tensors]
    assert names == ["image/b", "image/w", "image/w_scale", "image/x_scale", "image/x_zero"]
    trial = subject.trial(fault(2, 0, 31))
    assert (trial.agreement, trial.cosine) == (0, 0)
    assert "weight_scale[0] is -1" in trial.refused
    # q = 1 becomes -127: red is (-127, 0, 0)
    assert subject.trial(fault(1, 0, 7)).cosine == pytest.approx((-1 + 1 + 1) / 3)


def clipped(graphs: dict[str, onnx.ModelProto]) -> None:
    """A bound of 1 after the product, as `calibrate` inserts them."""
    graph = graphs["image"].graph
    graph.node[1].output[0] = "free"
    bounds = {f"row{LOW}": np.float32(-1), f"row{HIGH}": np.float32(1)}
    graph.node.insert(2, helper.make_node("Clip", ["free", *bounds], ["row"]))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in bounds.items())


def test_a_bundle_with_bounds_gets_the_same_faults(runner, colours, data):
    """Where bit 30 of a 0 makes 2.0, the bound makes 1.0, so red is (1, 1, 0) and stays red, the first of two."""
    bounded = Subject(open_bundle(colours("bounded", clipped), threads=1), data, ["image"])
    free = Subject(runner, data, ["image"])
    assert bounded.trial(fault(0, 1, 30)).agreement == 1 > free.trial(fault(0, 1, 30)).agreement
    settings = Settings(rates=(1e-2,), repeats=40, count="binomial")
    result = inject.run([free, bounded], settings)
    (gain,) = result.gains
    assert inject.run([bounded, free], settings).gains == (gain,)
    assert (gain.bundle, gain.other) == ("bounded", "colours")
    whole = {curve.bundle: curve.points[0] for curve in result.curves}
    assert whole["bounded"].faults == whole["colours"].faults > 1
    assert gain.agreement[0].value == pytest.approx(whole["bounded"].agreement.value - whole["colours"].agreement.value)
    assert gain.agreement[0].lower <= gain.agreement[0].value <= gain.agreement[0].upper
    assert {*result.milliseconds} == {"colours", "bounded"}


def test_a_rate_does_not_depend_on_the_other_rates(subject: Subject):
    def curve(*rates: float):
        return inject.run(
            [subject],
            Settings(rates=rates, repeats=3, count="binomial", apart=True, kinds=("scale", "weight", "weight")),
        ).curves

    alone, among = curve(1e-2), curve(0, 1e-2, 5e-3)
    assert [c.part for c in alone] == [ALL, "weight"]
    assert [point.rate for point in among[0].points] == [0, 5e-3, 1e-2]
    assert among[0].points[0].agreement == inject.Mean(1, 1, 1)
    for name in ("faults", "agreement", "cosine", "refused"):
        assert (
            getattr(alone[0].points[0], name) == getattr(among[0].points[2], name) == getattr(alone[1].points[0], name)
        )


def test_two_bundles_of_one_name_are_refused(subject: Subject):
    with pytest.raises(BadRequest, match="called colours, colours"):
        inject.run([subject, subject], Settings())


class Planned:
    """A subject whose trials were worked out: the agreement at each rate is the mean of two."""

    name, signature = "planned", ()

    def __init__(self, *pairs):
        self.trials = [Trial(1, agreement, 1, 0) for pair in pairs for agreement in pair]


def test_the_rate_of_one_half_lies_between_logarithms():
    rates = (1e-6, 1e-5, 1e-4)
    plan = Planned((1, 0.8), (0.6, 0.8), (0.2, 0))
    trials = {rate: plan.trials[2 * i : 2 * i + 2] for i, rate in enumerate(rates)}
    curve = inject._curve("planned", ALL, trials)
    assert [point.agreement.value for point in curve.points] == pytest.approx([0.9, 0.7, 0.1])
    assert curve.half == pytest.approx(10 ** (-5 + (0.7 - 0.5) / (0.7 - 0.1)))
    assert inject._curve("planned", ALL, {rate: trials[rate] for rate in rates[:2]}).half is None


def test_the_interval_is_that_of_the_normal_distribution_for_many_repetitions():
    values = np.repeat([0.0, 1.0], [300, 700])
    mean, error = inject._mean(values), np.sqrt(0.7 * 0.3 / 1000)
    assert (mean.value, mean.lower, mean.upper) == pytest.approx(
        (0.7, 0.7 - 1.96 * error, 0.7 + 1.96 * error), abs=0.004
    )


def test_one_bit_at_a_time(subject: Subject):
    """Of the identity's nine numbers six are 0; bit 30 makes a 1 infinite, and a 0 2.0."""
    cells = inject.bits(subject, Settings(repeats=6))
    assert [(c.kind, c.dtype, c.bit, c.stored) for c in cells] == [("weight", "float32", bit, 9) for bit in range(32)]
    assert cells[0].hurt == 0
    assert cells[0].agreement.value == 1
    assert cells[30].hurt == 1
    assert 0 < cells[31].hurt < 1  # of a 0 the sign says nothing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of the eval zero_shot."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    entries = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(images / f"{name}.png")
        entries.append({"file": f"{name}.png", "label": name})
    (images.parent / "labels.json").write_text(json.dumps(entries))
    return images.parent


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_verb(colours, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directories = [str(colours()), str(colours("bounded", clipped))]
    before = files(tmp_path)
    plain = ["resilience", "inject", directories[0], "--data", str(folder), "--rates", "0,0.02", "--repeats", "1"]
    assert main([*plain, "--against", directories[1], "--json", "--each-bit"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [curve["bundle"] for curve in value["curves"]] == ["colours", "bounded"]
    for curve in value["curves"]:
        assert [point["faults"] for point in curve["points"]] == [0, int(9 * 32 * 0.02)]
    assert (value["pictures"], value["bundles"][0]["numbers"]) == (3, {"weight": {"float32": 9}})
    assert value["bundles"][0]["shared"] == {"text": 1}
    assert len(value["each_bit"]) == 64
    assert files(tmp_path) == before
    shown = ["--plot", str(tmp_path / "out.png"), "--html", str(tmp_path / "out.html"), "--apart", "--limit", "2"]
    assert main([*plain, *shown]) == 0
    out = capsys.readouterr().out
    assert "colours: 0.0 Mbit of image (weight 9 float32); 2 pictures, repetitions: 1" in out
    assert "a fault in a shared tensor also reaches the graphs text (1)" in out
    assert {*files(tmp_path)} - {*before} == {str(tmp_path / "out.png"), str(tmp_path / "out.html")}
    assert Image.open(tmp_path / "out.png").format == "PNG"
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 1
    assert page.count("<table>") == 2
    assert "100.0 [100.0, 100.0]" in page


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rates", "0.5"], "0.5 is not within 0 to 0.02 flipped bits per bit"),
        (["--rates", "often"], "rates.0: Input should be a valid number"),
        (["--bits", "weight,sign"], "kinds.1: Input should be 'weight', 'bias', 'scale' or 'zero'"),
        (["--bits", "scale"], "the graphs image of colours store no scale; they store weight"),
        (["--graphs", "detect"], "the graph 'detect' takes no part in zero-shot labels"),
        (["--data", "nowhere"], "nowhere/labels.json cannot be read"),
        (["--against", "colors"], "there is no bundle 'colors'"),
    ],
)
def test_wrong_input_is_one_sentence(colours, folder: Path, flags, says, capsys: pytest.CaptureFixture[str]):
    assert main(["resilience", "inject", str(colours()), "--data", str(folder), "--repeats", "1", *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert says in err[0]


def test_an_interrupt_leaves_nothing(colours, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(self, faults):
        raise KeyboardInterrupt

    directory = str(colours())
    before = files(tmp_path)
    monkeypatch.setattr(Subject, "trial", stop)
    plot = str(tmp_path / "out.png")
    assert main(["resilience", "inject", directory, "--data", str(folder), "--plot", plot]) == 130
    assert files(tmp_path) == before
