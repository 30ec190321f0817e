import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

from calmclip.export import samples, teach
from calmclip.export.nets.mini.backbone import Backbone
from calmclip.export.nets.mini.facts import PROPOSALS
from calmclip.export.nets.mini.masks import MaskFeatures
from calmclip.export.nets.mini.nanodet import NanoDet
from calmclip.export.nets.mini.quality import Quality
from calmclip.export.nets.mini.regions import HALF, RegionHead, Regions, average, extent
from calmclip.export.nets.mini.towers import Heads, ImageHead
from calmclip.export.photographs import Photographs
from calmclip.export.regions import SCALE
from calmclip.export.teach_cli import teach_command
from calmclip.models.errors import BadImage, BadRequest
from calmclip.models.evals.average_precision import Boxes, overlaps
from calmclip.models.runner import open_bundle


def pictures(count: int, folder: Path = Path()) -> tuple[Path, ...]:
    return tuple(folder / f"{number:02}.png" for number in range(count))


def boxes(*classes: int) -> Boxes:
    return Boxes.true(np.tile([0.0, 0, 9, 9], (len(classes), 1)), np.array(classes, np.int64))


def test_a_fifth_of_each_name_is_held_out():
    data = Photographs("folders", pictures(30), ("a", "b"), labels=(0,) * 20 + (1,) * 10)
    trains, held = teach.split(data, seed=3)
    assert sorted(trains + held) == [*range(30)]
    assert [sum(place < 20 for place in held), sum(place >= 20 for place in held)] == [4, 2]
    assert teach.split(data, seed=3) == (trains, held)
    assert teach.split(data, seed=4) != (trains, held)


def test_a_picture_with_boxes_counts_for_the_rarest_of_their_names():
    rows = [boxes(0, 1)] * 5 + [boxes(0)] * 10
    _, held = teach.split(Photographs("coco", pictures(15), ("a", "b"), tuple(rows)), seed=0)
    assert [sum(place < 5 for place in held), sum(place >= 5 for place in held)] == [1, 2]


def test_few_photographs_are_an_error():
    with pytest.raises(BadRequest, match="there are 9 photographs; expected at least 10"):
        teach.split(Photographs("plain", pictures(9)), seed=0)


def test_a_region_has_the_name_of_the_box_it_fits():
    truth = Boxes.true(np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 60, 10]]), np.array([4, 5, 6]))
    truth.crowd[2] = True
    regions = np.array(
        [
            [0, 0, 10, 8],  # IoU .8 with the first
            [21, 0, 30, 10],  # .9 with the second
            [0, 0, 4, 10],  # .4 with the first: neither
            [51, 0, 60, 10],  # in the crowd: neither
            [80, 80, 90, 90],  # beside all
            [70, 70, 75, 75],  # beside all, but no region
        ],
        np.float64,
    )
    objectness = np.array([0.5, 0.4, 0.3, 0.3, 0.2, 0.0])
    assert teach.names_of(regions, objectness, truth).tolist() == [4, 5, -2, -2, teach.NO_NAME, -2]
    assert teach.names_of(regions, objectness, boxes()).tolist() == [teach.NO_NAME] * 5 + [-2]


def test_the_losses_are_cross_entropies_without_related_texts():
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    texts[3] = F.normalize(texts[0] + 0.1 * texts[2], dim=-1)  # means nearly the same as the first name
    assert (texts[:2] @ texts.T > teach.RELATED).tolist() == [
        [True, False, False, True, False],
        [False, True] + [False] * 3,
    ]
    vectors = F.normalize(torch.randn(3, 8, generator=generator), dim=-1)
    vectors[2] = F.normalize(texts[1] + texts[4], dim=-1)
    naming, absent = teach.naming_loss(vectors, torch.tensor([0, 1, teach.NO_NAME]), texts, 2)
    logits = SCALE * vectors.double() @ texts.double().T
    first = F.cross_entropy(logits[:1, [0, 1, 2, 4]], torch.tensor([0]))
    second = F.cross_entropy(logits[1:2], torch.tensor([1]))
    assert naming.item() == pytest.approx(((first + second) / 2).item(), abs=1e-4)
    assert absent.item() == pytest.approx(-torch.log(1 - logits[2].softmax(-1)[:2].sum()).item(), abs=1e-4)
    nothing = teach.naming_loss(vectors[2:], torch.tensor([teach.NO_NAME]), texts, 2)[0]
    assert nothing.item() == 0


@pytest.fixture(scope="module")
def module() -> Regions:
    """The `regions` tower with random weights."""
    torch.manual_seed(0)
    backbone = Backbone().eval()
    shapes = {"image_weight": (384, 1664), "image_bias": (384,), "text_weight": (384, 384), "text_centre": (384,)}
    shapes |= {"feature_mean": (1280,), "feature_std": (1280,), "class_table": (1000, 384)}
    heads = Heads(**{name: torch.rand(shape) + 0.1 for name, shape in shapes.items()})
    names, head = F.normalize(torch.randn(80, 384), dim=-1), RegionHead()
    nn.init.normal_(head.outer.weight)
    return Regions(
        NanoDet(), Quality(), backbone, ImageHead(heads, backbone.classifier), head, names, MaskFeatures()
    ).eval()


@torch.inference_mode()
def test_taught_vectors_are_those_of_the_regions_graph(module: Regions):
    pixels = torch.randn(1, 3, 416, 416, generator=torch.Generator().manual_seed(1))
    chances, proposed, _, features = module.propose(pixels)
    vectors = module.image(average(module.backbone(F.avg_pool2d(pixels, HALF))[1], proposed, HALF * 32))
    known = chances[0].square() @ module.names
    named = teach.Named(vectors[0], features[0], known, extent(proposed)[0], torch.zeros(100, dtype=torch.int64))
    torch.testing.assert_close(teach.combined(named, module.head), module(pixels)[0][0])


def test_training_pulls_named_regions_to_their_names():
    generator = torch.Generator().manual_seed(2)
    texts = F.normalize(torch.randn(2 + len(teach.BACKGROUND) + 20, 384, generator=generator), dim=-1)
    rows = {"vectors": 384, "features": 896, "known": 384}
    tensors = {name: torch.randn(60, width, generator=generator) for name, width in rows.items()}
    tensors |= {name: F.normalize(tensors[name], dim=-1) for name in ("vectors", "known")}
    names = torch.arange(60) % 3 - 1  # a third has no name
    tensors["features"][:, :3] += 4 * F.one_hot(names + 1, 3)
    named = teach.Named(**tensors, side=torch.full((60, 1), 0.2), names=names)
    seen = teach.Seen(tensors["vectors"], tensors["features"], tensors["vectors"])
    start = RegionHead()
    head = teach.train_head(seen, named, texts, 2, start, steps=20)
    before, after = (teach.naming_loss(teach.combined(named, h), names, texts, 2) for h in (start, head))
    assert after[0] < before[0] / 2
    assert after[1] < 0.1
    again = teach.train_head(seen, named, texts, 2, start, steps=20)
    assert torch.equal(head.outer.weight, again.outer.weight)


def test_pictures_without_names_train_by_their_crops_alone():
    generator = torch.Generator().manual_seed(4)
    texts = object.__new__(teach.Student).named(())
    vectors, crops = (F.normalize(torch.randn(40, 384, generator=generator), dim=-1) for _ in range(2))
    features = torch.randn(40, 896, generator=generator)
    nothing = teach.Named(*(torch.zeros(0, width) for width in (384, 896, 384, 1)), torch.zeros(0, dtype=torch.int64))
    known = torch.cat((torch.from_numpy(texts), F.normalize(torch.randn(30, 384, generator=generator), dim=-1)))
    start = RegionHead()
    head = teach.train_head(teach.Seen(vectors, features, crops), nothing, known, len(texts), start, steps=20)
    before, after = ((h(vectors, features) * crops).sum(-1).mean() for h in (start, head))
    assert after > before + 0.3


def test_a_stopped_run_goes_on_and_a_second_run_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = pictures(4, tmp_path)
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    student: Any = SimpleNamespace(module=nn.Linear(2, 2), cache=teach.Cache(tmp_path / "cache"))
    data = Photographs("folders", paths, ("a", "b"), labels=(0, 1, 0, 1))
    looked: list[bytes] = []

    def stops_after(most: int) -> Callable[..., dict[str, np.ndarray]]:
        def see(student: object, content: bytes, truth: None, label: int) -> dict[str, np.ndarray]:
            if len(looked) == most:
                raise KeyboardInterrupt
            looked.append(content)
            return {"label": np.array([label]), "content": np.frombuffer(content, np.uint8)}

        return see

    monkeypatch.setattr(teach, "_look", stops_after(3))
    with pytest.raises(KeyboardInterrupt):
        teach.look(student, data, "")
    monkeypatch.setattr(teach, "_look", stops_after(99))
    rows = teach.look(student, data, "")
    assert looked == [b"\0", b"\1", b"\2", b"\3"]
    assert [row["label"].item() for row in rows] == [0, 1, 0, 1]
    assert [row["content"].item() for row in teach.look(student, data, "")] == [0, 1, 2, 3]
    assert len(looked) == 4
    paths[1].write_bytes(b"\7")  # another picture
    teach.look(student, Photographs("folders", paths, ("a", "b"), labels=(0, 1, 1, 1)), "")  # and another name
    assert looked[4:] == [b"\7", b"\2"]
    torch.nn.init.zeros_(student.module.weight)  # other weights
    teach.look(student, data, "")
    assert len(looked) == 10


def test_a_broken_picture_is_named(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    student: Any = SimpleNamespace(module=nn.Linear(2, 2), cache=teach.Cache(None))
    with pytest.raises(BadImage, match=r"a\.jpg: "):
        teach.look(student, Photographs("plain", (path,)), "")


@pytest.fixture(scope="module")
def student() -> teach.Student:
    """Without networks: names and background are unit vectors of 384 axes."""
    student = object.__new__(teach.Student)
    student.__dict__["background"] = np.eye(384, dtype=np.float32)[300:302]
    student.__dict__["named"] = lambda names: np.eye(384, dtype=np.float32)[: len(names)]
    return student


def answer(axes: list[int], boxes: list[list[float]]) -> dict[str, np.ndarray]:
    """Regions of a picture of 200 x 100 pixels, which is 416 x 208 in the input; the first is the surest."""
    empty = PROPOSALS - len(axes)
    return {
        "class_embeds": np.eye(384, dtype=np.float32)[None, axes + [0] * empty],
        "boxes": np.array([boxes + [[100, 20, 180, 90]] * empty], np.float32) * np.float32(2.08),
        "objectness": np.append(np.linspace(0.9, 0.5, len(axes)), np.zeros(empty)).astype(np.float32)[None],
        "size": np.array([200, 100]),
    }


def test_figures_of_boxes_by_hand(student: teach.Student):
    """The first picture is right. In the second, of two boxes one is named wrong, and one has no region."""
    corners = [[10.0, 10, 50, 50], [100, 20, 180, 90]]
    truth = tuple(Boxes.true(np.array(corners), np.array(classes)) for classes in ([0, 1], [0, 1]))
    rows = [answer([0, 1, 0], [*corners, [5, 101, 20, 190]]), answer([1, 300], [corners[0], [0, 60, 20, 80]])]
    figures = teach.measures(student, Photographs("coco", pictures(2), ("a", "b"), truth), rows, [])
    assert next(iter(figures)) == "AP50"
    first, second, both = np.array([1, 0]), np.array([0, 1]), np.array([1, 1])
    assert [figures["AP50"](weights) for weights in (first, second)] == [pytest.approx(100), 0]
    assert [figures["boxes proposed"](weights) for weights in (first, second, both)] == [100, 50, 75]
    assert figures["regions named right"](both) == pytest.approx(100 * 2 / 3)


def test_a_picture_has_the_name_of_its_best_pair(student: teach.Student, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teach, "_other_names", lambda *_: np.eye(384, dtype=np.float32)[5:6])
    box = [0.0, 0, 50, 50]
    rows = [answer([1, 0], [box] * 2), answer([5, 1], [box] * 2), answer([300, 0], [box] * 2)]
    data = Photographs("folders", pictures(3), ("a", "b"), labels=(1, 1, 0))
    figures = teach.measures(student, data, rows, [])
    assert [figures["pictures named right"](weights) for weights in np.eye(3, dtype=int)] == [100, 100, 100]
    assert [figures["among 1080 more names"](weights) for weights in np.eye(3, dtype=int)] == [100, 0, 100]
    lone = Photographs("folders", pictures(3), ("a",), labels=(0, 0, 0))
    assert next(iter(teach.measures(student, lone, rows, []))) == "among 1080 more names"  # the other is always right


def test_things_keep_their_names_by_hand(student: teach.Student):
    student.module = SimpleNamespace(names=torch.eye(384)[:80])  # type: ignore[assignment]
    corners = [[0.0, 0, 50, 50], [60, 0, 99, 50], [100, 50, 150, 90], [150, 50, 190, 90]]
    old = answer([3, 4, 5, 300], corners)  # the last is background
    assert teach.kept_names(student, [old], [old]) == 100
    moved = answer([4, 3, 6], [corners[1], corners[0], corners[2]])  # another order, and the third has another name
    lost = answer([3, 5], [[0, 0, 50, 48], [130, 50, 180, 90]])  # two are not proposed
    assert teach.kept_names(student, [old, old], [moved, lost]) == 50


def test_differences_of_two_figures_by_hand():
    right, all_right = np.array([1, 0, 0, 0]), np.array([1, 1, 1, 1])
    sides = [
        {"x": teach._ratio(row, np.ones(4, np.int64)), "empty": teach._ratio(row, row * 0)}
        for row in (right, all_right)
    ]
    rows = teach.compared(*sides, count=4, seed=0)
    # a draw of one of the three wrong pictures gains a quarter: all four draws do with chance .32, none with .004
    assert rows["x"] == {"before": 25.0, "after": 100.0, "difference_95": [25.0, 100.0]}
    assert rows["empty"] == {"before": None, "after": None, "difference_95": [None, None]}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `teach` measures before and after; no network runs."""
    values = [10.0, 20.0]
    module = SimpleNamespace(head=RegionHead(), quality=Quality(), boxes=NanoDet())
    measured = {"Student": lambda cache: SimpleNamespace(module=module), "look": lambda student, data, title: [{}] * 10}
    measured |= {"answers": lambda *_: [], "kept_names": lambda *_: 99.0}
    measured |= {"taught": lambda *_: (RegionHead(), Quality(), "10 photographs")}
    sides = iter([{"AP50": lambda weights: values[0]}, {"AP50": lambda weights: values[1]}])
    measured |= {"measures": lambda *_: next(sides)}
    for name, function in measured.items():
        monkeypatch.setattr(teach, name, function)
    return values


def test_weights_that_are_no_better_are_not_written(
    figures: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    figures[1] = 10.0
    for number in range(10):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    assert teach_command([str(tmp_path), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "NO BETTER: AP50 did not rise on the photographs held out, so nothing is written" in printed
    assert "export it with" not in printed
    assert not out.exists()


def test_keep_writes_them_and_says_so(figures: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures[1] = 5.0
    for number in range(10):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    assert teach_command([str(tmp_path), "--out", str(out), "--keep", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["improved"] is False
    assert report["held_out"]["figures"]["AP50"]["after"] == 5.0
    assert report["export"] == f"calmclip export {out}"
    assert json.loads((out / "report.json").read_text())["detector"] == str(out / "detector.safetensors")


@pytest.mark.usefixtures("figures")
def test_export_seals_the_bundle_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def export(argv: list[str]) -> int:
        print(json.dumps({"sealed": [{"directory": f"of {argv[0]}"}]}))
        return 0

    monkeypatch.setattr("calmclip.export.cli.export_command", export)
    for number in range(10):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    assert teach_command([str(tmp_path), "--out", str(out), "--export", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exported"] == [{"directory": f"of {out}"}]
    assert (out / "detector.safetensors").is_file()


def thing(kind: int, side: int) -> Image.Image:
    """A striped disc, or a dotted triangle."""
    picture, mask = Image.new("RGB", (200, 200), ("deeppink", "turquoise")[kind]), Image.new("L", (200, 200))
    pen, shape = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    for x in range(0, 200, 40):
        if kind == 0:
            pen.rectangle((x, 0, x + 18, 200), "gold")
        for y in range(0, 200 * kind, 40):
            pen.ellipse((x, y, x + 24, y + 24), "navy")
    if kind == 0:
        shape.ellipse((0, 0, 199, 199), 255)
    else:
        shape.polygon([(100, 0), (199, 199), (0, 199)], 255)
    picture.putalpha(mask)
    return picture.resize((side, side))


def draw(folder: Path, paths: list[Path], seed: int) -> dict[str, list[tuple[int, list[float]]]]:
    """Photographs with one thing or two in each, in YOLO's layout; -> file -> kinds and boxes in pixels."""
    random, drawn = np.random.default_rng(seed), {}
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    (folder / "data.yaml").write_text("names: [zorblat, quimble]\n")
    for number, path in enumerate(paths):
        photograph = Image.open(path).convert("RGB")
        photograph.thumbnail((400, 400))
        wide, high = photograph.size
        rows = []
        for kind in random.permutation(2)[: random.integers(1, 3)].tolist():
            side = min(int(random.integers(60, 140)), *photograph.size)
            x, y = int(random.integers(0, wide - side + 1)), int(random.integers(0, high - side + 1))
            shape = thing(kind, side)
            photograph.paste(shape, (x, y), shape)
            rows.append((kind, [x, y, x + side, y + side]))
        photograph.save(folder / "images" / f"{number}.png")
        drawn[f"{number}.png"] = rows
        lines = [
            f"{kind} {(x0 + x1) / 2 / wide} {(y0 + y1) / 2 / high} {(x1 - x0) / wide} {(y1 - y0) / high}\n"
            for kind, (x0, y0, x1, y1) in rows
        ]
        (folder / "labels" / f"{number}.txt").write_text("".join(lines))
    return drawn


@pytest.mark.slow
def test_a_taught_bundle_finds_things_with_made_up_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photographs = [path for path in samples.calibration_pictures() if not path.stem.startswith("leaves")]
    draw(tmp_path / "things", [*photographs, *samples.pictures()[:12]], seed=0)
    out = tmp_path / "taught" / "things"
    assert teach_command([str(tmp_path / "things"), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    precision = report["held_out"]["figures"]["AP50"]
    assert precision["before"] < 30
    assert precision["after"] > 50
    assert precision["difference_95"][0] > 0
    from calmclip.models.cli import main

    assert main(["export", str(out), "--out", str(tmp_path / "bundles"), "--no-keep-float"]) == 0
    (sealed,) = (tmp_path / "bundles").glob("things-*")  # the figures of other weights decide: int8 or mixed
    runner = open_bundle(sealed)
    names = ["zorblat", "quimble"]
    right = total = 0
    new = draw(tmp_path / "new", samples.pictures()[12:], seed=1)  # photographs that trained nothing
    for file, rows in new.items():
        answer = runner.detect(tmp_path / "new" / "images" / file, names)
        for kind, box in rows:
            best = next((hit for hit in answer if hit.index == kind), None)
            fits = best is not None and overlaps(best.box[None], np.array([box]), np.zeros(1, bool)).item() >= 0.5
            right, total = right + fits, total + 1
    assert right > 0.6 * total
