"""segment over invented maps, beside torch's interpolation and pycocotools; and over a graph of mean colours, whose
masks are the coloured parts of a picture."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torch.nn import functional as F

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest, SegmentationDefaults, parse
from calmclip.models.bundle.store import read
from calmclip.models.classifier import Classifier
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, ClassifierMismatch, TaskNotServed, TooManyLabels
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.ops.reference import iou
from calmclip.models.preprocess.placement import Frame
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.segmenters import ScoreMap, default, fitting
from calmclip.models.suppression import Suppression
from calmclip.models.tasks import require, segment, served
from calmclip.models.tasks.segment import (
    BACKGROUND,
    BOXES,
    Layer,
    SegmentRequest,
    Segments,
    exclusive,
    independent,
    masked,
    weights,
    working_size,
)

DRAW = np.random.default_rng(0)
COLOURS = ("red", "green", "blue")
WIDE = Frame(64, 32, (8 / 64, 4 / 32), (0.0, 0.0))  # a picture of 64 x 32 pixels fills 4 of 8 rows of a map


def drawn(labels: int, size: tuple[int, int], frame: Frame, background: bool = True) -> ScoreMap:
    logits = 4 * DRAW.standard_normal((labels + 1, *size)).astype(np.float32)
    return ScoreMap(logits[:labels], logits[labels] if background else np.full(size, -np.inf, np.float32), frame)


def enlarged(planes: Array, size: tuple[int, int]) -> Array:
    tensor = torch.from_numpy(planes)[None].double()
    return np.asarray(F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0])


def halves(left: str = "red", right: str = "blue", size: tuple[int, int] = (64, 64), middle: int = 32) -> Image.Image:
    picture = Image.new("RGB", size, right)
    picture.paste(Image.new("RGB", (middle, size[1]), left))
    return picture


def encoded(picture: Image.Image, format: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **how)
    return file.getvalue()


@pytest.fixture
def runner(segmenter: Path) -> Runner:
    return open_bundle(segmenter)


def changed(bundle: Bundle, **settings: Any) -> Bundle:
    """With defaults of segmentation."""
    bundle.manifest = bundle.manifest.model_copy(update={"segmentation": SegmentationDefaults(**settings)})
    return bundle


# --- the plane of pixels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [Frame(600, 600, (8 / 600, 8 / 600), (0, 0)), WIDE, Frame(7, 5, (1, 1), (0, 0))])
@pytest.mark.parametrize("background", [True, False])
def test_a_pixel_has_the_label_that_is_best_after_torchs_enlargement(
    frame: Frame, background: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(segment, "LONG_SIDE", 100)
    scores = drawn(6, (8, 8), frame, background)
    (layer,) = exclusive(scores, 0.0)
    width, height = working_size(frame.width, frame.height)
    rows, columns = round(frame.height * frame.scale[1]), round(frame.width * frame.scale[0])
    logits = np.concatenate((scores.labels, np.maximum(scores.background[None], -1e4)))[:, :rows, :columns]
    planes = enlarged(logits, (height, width))
    top = np.sort(planes, axis=0)
    clear = top[-1] - top[-2] > 1e-4  # float32 may decide a tie otherwise
    names = np.where(planes.argmax(axis=0) == 6, -1, planes.argmax(axis=0))
    assert clear.mean() > 0.99
    assert np.array_equal(layer.names[clear], names[clear])
    chances = enlarged(np.exp(logits) / np.exp(logits).sum(axis=0), (height, width))
    likely = np.take_along_axis(chances, layer.names.clip(0)[None].astype(np.int64), axis=0)[0]
    assert layer.likely[layer.names >= 0] == pytest.approx(likely[layer.names >= 0], abs=1e-5)


def test_strips_and_contenders_do_not_change_the_plane(monkeypatch: pytest.MonkeyPatch):
    """Many labels, most of them the best nowhere; a strip of one row."""
    scores = drawn(40, (5, 9), Frame(90, 50, (0.1, 0.1), (0, 0)))
    (whole,) = exclusive(scores, 0.0)
    monkeypatch.setattr(segment, "STRIP", 1)
    monkeypatch.setattr(segment, "contenders", lambda logits: np.ones((len(logits), 1), bool))
    (other,) = exclusive(scores, 0.0)
    assert np.array_equal(whole.names, other.names)
    assert whole.likely == pytest.approx(other.likely, abs=1e-6)


def test_the_order_of_the_labels_changes_no_mask():
    scores, order = drawn(6, (8, 8), WIDE), [3, 0, 5, 1, 4, 2]
    for planes in (exclusive, independent):
        plain = {name: layer.names == name for layer in planes(scores, 0.2) for name in range(6)
                 if (layer.names == name).any()}  # fmt: skip
        turned = ScoreMap(scores.labels[order], scores.background, scores.frame)
        masks = {order[name]: layer.names == name for layer in planes(turned, 0.2) for name in range(6)
                 if (layer.names == name).any()}  # fmt: skip
        assert plain.keys() == masks.keys() != set()
        assert all(np.array_equal(plain[name], masks[name]) for name in plain)


def test_padding_has_no_say():
    """A label of the padding alone, with a logit that would spread into the picture."""
    scores = drawn(3, (8, 8), WIDE)
    scores.labels[2] = -50
    scores.labels[2, 4:] = 1e4
    (layer,) = exclusive(scores, 0.0)
    assert layer.names.shape == (32, 64)
    assert layer.names.max() == 1


def test_cells_without_any_logit_have_no_label():
    scores = drawn(2, (4, 4), Frame(40, 40, (0.1, 0.1), (0, 0)), background=False)
    scores.labels[:, :, :2] = -np.inf
    (layer,) = exclusive(scores, 0.0)
    assert (layer.names[:, :15] == -1).all()
    assert (layer.names[:, 25:] >= 0).all()


def test_each_label_alone_is_compared_with_the_background():
    scores = drawn(3, (8, 8), WIDE)
    margins = scores.labels[:, :4] - scores.background[:4]
    likely = enlarged(1 / (1 + np.exp(-margins.astype(np.float64))), (32, 64))
    layers = [*independent(scores, 0.6)]
    assert len(layers) == 3
    for index, layer in enumerate(layers):
        assert layer.likely == pytest.approx(likely[index], abs=1e-5)
        clear = abs(likely[index] - 0.6) > 1e-5
        assert np.array_equal(layer.names[clear], np.where(likely[index] >= 0.6, index, -1)[clear])


def test_a_threshold_takes_what_is_less_likely():
    scores = drawn(3, (8, 8), WIDE)
    (all_,), (sure,) = exclusive(scores, 0.0), exclusive(scores, 0.7)
    assert np.array_equal(sure.names, np.where(all_.likely >= 0.7, all_.names, -1))
    assert 0 < (sure.names >= 0).sum() < (all_.names >= 0).sum()


@pytest.mark.parametrize(
    ("size", "wanted"), [((4000, 3000), (512, 384)), ((300, 200), (300, 200)), ((9000, 3), (512, 1))]
)
def test_the_plane_is_bounded(size: tuple[int, int], wanted: tuple[int, int]):
    assert working_size(*size) == wanted
    down, across = weights(Frame(*size, (7 / size[0], 5 / size[1]), (0, 0)), (5, 7))
    assert (down.shape, across.shape) == ((wanted[1], 5), (7, wanted[0]))
    assert down.sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert across.sum(axis=0) == pytest.approx(1, abs=1e-6)


# --- masks and boxes -------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_components_through_soft_nms():
    """A frame around a square, and a speck: 3 components. The square lies in the frame's box, and loses score."""
    names = np.full((40, 60), -1)
    names[5:35, 5:35] = 0
    names[8:32, 8:32] = -1
    names[10:30, 10:30] = 0
    names[20, 50] = 0
    likely = np.where(names == 0, np.float32(0.9), np.float32(0.1))
    likely[10:30, 10:30] = 0.8
    (part,) = masked(["thing"], 600, 400, [Layer(names, likely)], Suppression(min_score=0.0))
    overlap = 200 * 200 / (300 * 300)
    assert part.boxes.tolist() == [[50, 50, 350, 350], [100, 100, 300, 300]]  # the speck has no box
    assert part.box_scores.tolist() == pytest.approx([0.9, 0.8 * np.exp(-(overlap**2) / 0.5)])
    assert iou(part.boxes[0], part.boxes[1:])[0] == pytest.approx(overlap)
    assert part.area == 100 * (names == 0).sum()
    assert part.score == pytest.approx(likely[names == 0].mean())
    assert [*map(int, coco.toBbox(part.mask.rle()))] == [50, 50, 460, 300]  # x, y, width, height of all


def test_a_label_of_specks_has_the_box_of_the_largest():
    names = np.full((100, 100), -1)
    names[3, 3:5] = names[50, 50] = 0
    (part,) = masked(["thing"], 100, 100, [Layer(names, np.ones((100, 100), np.float32))], BOXES)
    assert part.boxes.tolist() == [[3, 3, 5, 4]]
    assert part.area == 3


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch):
    names = DRAW.integers(0, 3, (100, 100))
    layer = Layer(names, np.ones(names.shape, np.float32))
    runs = sum(len(each.mask.counts) for each in masked([*"abc"], 100, 100, [layer], BOXES))
    monkeypatch.setattr(segment, "MAX_RUNS", runs // 2)
    with pytest.raises(BadRequest, match=f"more than {runs // 2} runs .* Send fewer labels, a higher threshold"):
        masked([*"abc"], 100, 100, [layer], BOXES)


def test_pngs_show_the_labels():
    names = DRAW.integers(-1, 3, (12, 16))
    segments = masked([*"abcd"], 16, 12, [Layer(names, DRAW.random((12, 16)).astype(np.float32))], BOXES)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(segments.indexed_png()))), names + 1)
    for label, name in (("b", 1), ("d", 3)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(segments.png(label)))), names == name)
    with pytest.raises(BadRequest, match="there is no label 'e'"):
        segments.png("e")


def test_where_masks_overlap_the_indexed_png_shows_the_best_score():
    layers = [Layer(np.full((4, 4), index), np.full((4, 4), p, np.float32)) for index, p in enumerate((0.6, 0.9, 0.7))]
    segments = masked([*"abc"], 4, 4, layers, BOXES)
    assert [part.label for part in segments] == ["b", "c", "a"]
    assert np.unique(np.asarray(Image.open(io.BytesIO(segments.indexed_png())))).tolist() == [2]


def test_an_indexed_png_has_no_colour_for_the_label_256():
    layer = Layer(np.full((4, 4), 255), np.ones((4, 4), np.float32))
    with pytest.raises(BadRequest, match="the label 255 has a mask"):
        masked([f"label {n}" for n in range(256)], 4, 4, [layer], BOXES).indexed_png()


# --- the task --------------------------------------------------------------------------------------------------------


def test_the_masks_of_a_picture_are_its_parts(runner: Runner):
    """Cells have one colour each, so the edge of the masks is that of the colours."""
    segments = runner.segment(halves(), COLOURS, background=())
    assert [part.label for part in segments] == ["red", "blue"]
    red, blue = segments
    assert (red.area, blue.area) == (32 * 64, 32 * 64)
    assert red.mask.pixels()[:, :32].all()
    assert red.boxes.tolist() == [[0, 0, 32, 64]]
    assert blue.boxes.tolist() == [[32, 0, 64, 64]]
    # softmax over red, green and blue at the scale 100, at a cell of one colour
    assert red.score == pytest.approx(1, abs=0.1)


def test_a_constant_picture_has_one_label_everywhere(runner: Runner, png: Callable[..., bytes]):
    """Cosines are 1, 0 and 0; the background has a word that the tokenizer does not know, so its vector is 0."""
    picture, words = png("green", (40, 30)), ["unknown"]
    (part,) = runner.segment(picture, COLOURS, background=words, params={"scale": 2.0, "bias": 1.0})
    assert (part.label, part.area) == ("green", 40 * 30)
    assert part.score == pytest.approx(np.exp(2) / (np.exp(2) + 2 + np.exp(1)))
    assert part.boxes.tolist() == [[0, 0, 40, 30]]
    assert part.box_scores.tolist() == pytest.approx([part.score])
    # the bias wins: all of it is background
    assert not runner.segment(picture, COLOURS, background=words, params={"scale": 2.0, "bias": 3.0}).segments


def test_letterbox_and_original_are_mapped_to_each_other(runner: Runner):
    """100 x 50 pixels fill 32 x 16 of 32 x 32; the edge at 50 lies between two cells."""
    segments = runner.segment(halves(size=(100, 50), middle=50), COLOURS, background=())
    assert (segments.width, segments.height) == (100, 50)
    assert {part.label: part.boxes.tolist() for part in segments} == {
        "red": [[0, 0, 50, 50]], "blue": [[50, 0, 100, 50]],
    }  # fmt: skip


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_are_of_the_upright_picture(runner: Runner, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = halves(size=(80, 40), middle=20)
    upright = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    answer = runner.segment(encoded(turned, exif=exif), COLOURS, background=())
    plain = runner.segment(turned.transpose(upright[orientation]), COLOURS, background=())
    assert (answer.width, answer.height) == (plain.width, plain.height)
    assert [part.mask.rle() for part in answer] == [part.mask.rle() for part in plain]


def test_answers_do_not_depend_on_the_batch(runner: Runner):
    pictures = [halves(left, right, middle=middle) for left in COLOURS for right in COLOURS for middle in (8, 30)]
    alone = [runner.segment(picture, COLOURS) for picture in pictures]
    together = runner.segment_many(pictures, COLOURS, batch=8, threads=0)
    for one_by_one, answer in zip(alone, together, strict=True):
        assert [(p.label, p.score, p.mask.rle()) for p in answer] == [
            (p.label, p.score, p.mask.rle()) for p in one_by_one
        ]


def sentences(bundle: Bundle, **asked: Any) -> tuple[Segments, list[str]]:
    """The answer to a red picture, and the sentences that were embedded."""
    texts: list[str] = []

    def answer(call: Call) -> Arrays:
        if call.graph == "text":
            texts.extend(call.keys or ())
            rows = [[float(word in text) for word in COLOURS] for text in call.keys or ()]
            return {"text_embeds": np.array(rows, np.float32)}
        return {"patches": np.broadcast_to(np.array([1, 0, 0], np.float32), (1, 8, 8, 3))}

    return drive(segment.segment(bundle, SegmentRequest(halves(), **asked)), answer), texts


def test_a_word_of_the_bundle_that_means_a_label_is_no_background(runner: Runner):
    changed(runner.bundle, background=("red", "green"))
    (alone,) = runner.segment(halves(), ["red"], background=["green"])
    (segment,) = runner.segment(halves(), ["red"])
    assert segment.score == alone.score
    (tied,) = runner.segment(halves(), ["red"], background=["red", "green"])  # words of the request stay
    assert tied.score == pytest.approx(0.5)


def test_background_words_are_the_requests_else_the_bundles_else_a_dozen(segmenter: Path):
    bundle = Bundle(read(segmenter))
    segments, texts = sentences(bundle, labels=["green"], templates=["a {}."])
    assert sorted(texts) == sorted(["a green.", *(f"a {word}." for word in BACKGROUND)])
    assert len(BACKGROUND) == 12
    _, texts = sentences(changed(bundle, background=("red",)), labels=["green"])
    assert sorted(texts) == ["green", "red"]
    segments, texts = sentences(bundle, labels=["green"])
    assert not segments.segments  # the picture is red, as the background
    segments, texts = sentences(bundle, labels=["green"], background=[])
    assert texts == ["green"]
    assert [part.area for part in segments] == [64 * 64]
    _, texts = sentences(bundle, labels=["green"], background=["blue", "blue"])
    assert sorted(texts) == ["blue", "green"]


def test_a_threshold_is_the_requests_else_the_bundles(segmenter: Path):
    bundle = Bundle(read(segmenter))
    chance = np.exp(1) / (np.exp(1) + 1)
    asked: dict[str, Any] = {"labels": ["red", "green"], "background": [], "params": {"scale": 1.0}}
    assert [part.score for part in sentences(bundle, **asked)[0]] == pytest.approx([chance])
    assert not sentences(bundle, **asked, threshold=0.8)[0].segments
    assert not sentences(changed(bundle, threshold=0.8), **asked)[0].segments
    assert len(sentences(bundle, **asked, threshold=0.5)[0].segments) == 1
    asked |= {"background": ["blue"], "independent": True}
    assert [part.label for part in sentences(bundle, **asked)[0]] == ["red", "green"]  # 0.5 in place of the bundle's
    assert [part.score for part in sentences(bundle, **asked)[0]] == pytest.approx([chance, 0.5])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; expected 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan; expected 0 to 1"),
        ({"background": "sky"}, "background is the text 'sky'"),
        ({"background": ["sky", " "]}, "a background word is empty"),
        ({"background": [f"word {n}" for n in range(101)]}, "101 background words were given; at most 100"),
        ({"background": [], "independent": True}, "independent compares each label with the background"),
        ({"method": "maskclib"}, "there is no segmenters 'maskclib'; did you mean 'maskclip'"),
        ({"params": {"scale": -1}}, "method 'maskclip': params .*scale: Input should be greater than 0"),
        ({"params": {"gamma": 1}}, "method 'maskclip': params .*gamma"),
        ({"labels": ["red", "red"]}, "the label 'red' is given twice"),
        ({"suppression": Suppression(sigma=0)}, "sigma is 0"),
    ],
)
def test_bad_requests_say_what_is_expected(segmenter: Path, asked: Mapping[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        sentences(Bundle(read(segmenter)), **{"labels": ["red"], **asked})


def test_labels_may_be_a_classifiers_and_vectors_its_heads(segmenter: Path):
    bundle = Bundle(read(segmenter))
    stored = Classifier(("rouge", "vert"), ("the {}",), {"rouge": ("something red",)})
    segments, texts = sentences(bundle, classifier=stored, background=[])
    assert texts == ["something red", "the vert"]
    assert [part.label for part in segments] == ["rouge"]
    bank = np.eye(3, dtype=np.float32)[None, :2]
    assets = {"bank": bank, "gate": np.zeros((1, 3), np.float32), "bias": np.zeros(1, np.float32)}
    fitted = Classifier(("rouge", "vert"), head="mixture", params={"scale": 1.0}, assets=assets)
    segments, texts = sentences(bundle, classifier=fitted, background=[])
    assert texts == []
    assert [part.label for part in segments] == ["rouge"]
    with pytest.raises(ClassifierMismatch, match="was fitted to vectors of the family"):
        sentences(bundle, classifier=Classifier(**{**vars(fitted), "family": "0" * 64}))
    with pytest.raises(TooManyLabels, match="no labels were given"):
        sentences(bundle)


PEAK = """
import sys
import numpy as np
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.flow import drive
from calmclip.models.tasks.segment import SegmentRequest, segment
from pathlib import Path

draw = np.random.default_rng(0)
patches = draw.standard_normal((1, 9, 9, 512)).astype(np.float32).repeat(3, axis=1).repeat(3, axis=2)

def answer(call):
    if call.graph == "dense":
        return {"patches": patches}
    return {"text_embeds": draw.standard_normal((len(call.keys), 512)).astype(np.float32)}

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

bundle = Bundle(read(Path(sys.argv[1])))
labels = [f"label {n}" for n in range(80)]
drive(segment(bundle, SegmentRequest(np.zeros((32, 32, 3), np.uint8), labels[:1])), answer)
before = peak()
alone = sys.argv[3] == "True"
background = None if alone else ["ground"]
request = SegmentRequest(Path(sys.argv[2]), labels, background=background, independent=alone)
segments = drive(segment(bundle, request), answer)
assert (segments.width, segments.height) == (4000, 3000)
assert len(segments.segments) > 30
assert len(str([part.mask.rle() for part in segments])) > 100_000
assert len(segments.indexed_png()) > 10_000
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("independent", [False, True])
def test_12_megapixels_and_80_labels_need_at_most_200_mb(segmenter: Path, tmp_path: Path, independent: bool):
    """The picture itself has 36 MB, and one plane of all labels at its size would have 3.8 GB as float32."""
    colours = DRAW.integers(0, 255, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(colours).resize((4000, 3000)).save(tmp_path / "large.jpg")
    command = [sys.executable, "-c", PEAK, str(segmenter), str(tmp_path / "large.jpg"), str(independent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 30 < float(done.stdout) < 200


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_that_classifies_and_has_a_dense_map_segments(colours: dict[str, Any], segmenter: Path):
    manifest = read(segmenter).manifest
    assert "segment" in served(manifest)
    assert default(manifest) == "maskclip" == fitting(manifest)[0]
    plain = {role: graph for role, graph in manifest.graphs.items() if role != "dense"}
    assert "segment" not in served(manifest.model_copy(update={"graphs": plain}))
    assert "segment" not in served(manifest.model_copy(update={"tasks": ("embed",)}))
    listed = manifest.model_copy(update={"tasks": ("segment",), "graphs": plain})
    with pytest.raises(ValueError, match="task 'segment' needs a graph 'dense'"):
        require(listed)
    bundle = Bundle(read(segmenter)._replace(manifest=manifest.model_copy(update={"graphs": plain})))
    with pytest.raises(TaskNotServed, match=r"does not serve 'segment'; .* no graph 'dense' or 'masks'; export"):
        sentences(bundle, labels=["red"])


def test_a_manifest_chooses_the_method_and_its_params(segmenter: Path):
    bundle = Bundle(read(segmenter))
    asked: dict[str, Any] = {"labels": ["red", "green"], "background": []}
    changed(bundle, method="maskclip", params={"scale": 1.0})
    require(bundle.manifest)
    softly = np.exp(1) / (np.exp(1) + 1)
    assert [part.score for part in sentences(bundle, **asked)[0]] == pytest.approx([softly])
    assert [part.score for part in sentences(bundle, **asked, method="maskclip")[0]] == pytest.approx([softly])
    twice = np.exp(2) / (np.exp(2) + 1)
    assert [part.score for part in sentences(bundle, **asked, params={"scale": 2.0})[0]] == pytest.approx([twice])
    with pytest.raises(ValueError, match=r"`segmentation\.method` is 'samwise'; the graphs serve .*maskclip"):
        require(changed(bundle, method="samwise").manifest)


def test_a_manifest_of_a_file_may_have_defaults(colours: dict[str, Any]):
    colours["segmentation"] = {"method": "maskclip", "params": {"scale": 20}, "background": [], "threshold": 0.5}
    manifest: Manifest = parse(json.dumps(colours).encode(), "colours")
    assert manifest.segmentation == SegmentationDefaults(**colours["segmentation"])
    for wrong in ({"threshold": 2}, {"background": [""]}, {"methods": "x"}):
        colours["segmentation"] = wrong
        with pytest.raises(Exception, match="segmentation"):
            parse(json.dumps(colours).encode(), "colours")


# --- the command -----------------------------------------------------------------------------------------------------


def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["run", *argv]) == 0
    return capsys.readouterr().out


def test_the_command_prints_masks_and_writes_pictures(
    segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "flag.png").write_bytes(encoded(halves()))
    bundle: Sequence[str] = (segmenter.name, "segment", str(tmp_path / "flag.png"), "--bundles", str(segmenter.parent))
    labels = [word for label in COLOURS for word in ("--label", label)]
    (picture,) = json.loads(ran(capsys, *bundle, *labels, "--no-background", "--json"))["answers"]
    assert picture["size"] == [64, 64]
    for row, name in zip(picture["segment"], ("red", "blue"), strict=True):
        assert row["label"] == name
        assert coco.area(row["mask"]) == row["area"] == 32 * 64
    out = ran(capsys, *bundle, *labels, "--no-background", "--param", "scale=20", "--out", str(tmp_path / "one"))
    assert "50.0%    1 boxes  red" in out
    assert np.unique(np.asarray(Image.open(tmp_path / "one" / "flag.png"))).tolist() == [1, 3]
    ran(capsys, *bundle, "--label", "red", "--background", "blue", "--out", str(tmp_path / "each"), "--each")
    assert [path.name for path in (tmp_path / "each").iterdir()] == ["flag-0.png"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--param", "scale"], "--param is 'scale'; expected NAME=VALUE"),
        (["--background", "sky", "--no-background"], "--background and --no-background were given"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(
    segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
):
    (tmp_path / "flag.png").write_bytes(encoded(halves()))
    bundle = ["run", segmenter.name, "segment", str(tmp_path / "flag.png"), "--bundles", str(segmenter.parent)]
    assert main([*bundle, "--label", "red", *argv]) == 2
    assert says in capsys.readouterr().err
