"""The oracles are transformers and open_clip: their processors, tokenizers and models, on real photographs.

What `SiglipTokenizer` makes of 500 strings lies in tests/data/siglip/ids.json: it needs the sentencepiece package,
which nothing else of ours does.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

from calmclip.export.layouts import _siglip_text
from calmclip.export.layouts.hf_siglip import image_preprocess
from calmclip.export.nets.clip import load
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import TextTooLong, UnknownCheckpoint
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import Runner
from tests.tiny_layouts import sealed, siglip

NAMES = ("cat", "astronaut", "rocket", "coffee")
WRITERS = {"hf": siglip.hf_siglip, "hf2": siglip.hf_siglip2, "open_clip": siglip.open_clip_siglip}
KNOWN = json.loads((siglip.DATA / "ids.json").read_text(encoding="utf-8"))
TEXTS = ["A photo of a Cat.", "two dogs", "日本語 emoji 🐱 x", "it's __snake_case__ & more!", "  blanks   lead", "ΟΔΟΣ"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("siglip")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def runner(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runner]:
    out, made = tmp_path_factory.mktemp("bundles"), {}

    def of(name: str) -> Runner:
        if name not in made:
            made[name] = sealed.runner(load(str(checkpoints[name])), out, name)
        return made[name]

    return of


def reference_tokenizer(checkpoint: Path) -> Callable[[list[str]], torch.Tensor]:
    """Strings -> ids [N, 64], padded: by what transformers has for SigLIP 2, by the recorded ids for SigLIP."""
    if (checkpoint / _siglip_text.SENTENCEPIECE).is_file():
        known = dict(zip(KNOWN["strings"], KNOWN["ids"], strict=True))
        return lambda texts: torch.tensor([[*known[t], *[1] * (siglip.CONTEXT - len(known[t]))] for t in texts])
    tokenizer = transformers.Siglip2Tokenizer.from_pretrained(checkpoint)
    return lambda texts: tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def unit(rows: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(rows, dim=-1).numpy()


def test_pictures_and_texts_come_out_as_transformers_embeds_them(runner, checkpoints, photographs):
    name = "hf"  # of hf2 the towers are the same, its own are pixels and ids
    model = transformers.SiglipModel.from_pretrained(checkpoints[name]).eval()
    processor = transformers.SiglipImageProcessorPil.from_pretrained(checkpoints[name])
    for picture in NAMES:
        pixels = processor(Image.open(photographs[picture]).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            want = unit(model.get_image_features(pixels).pooler_output)
        assert runner(name).embed(images=[photographs[picture]]) == pytest.approx(want, abs=2e-5)
    texts = KNOWN["strings"][:8]
    with torch.no_grad():
        want = unit(model.get_text_features(reference_tokenizer(checkpoints[name])(texts)).pooler_output)
    assert runner(name).embed(texts=texts) == pytest.approx(want, abs=2e-5)
    assert runner(name).embed(texts=texts[2:3])[0] == pytest.approx(want[2], abs=2e-5)
    assert np.abs(want[0] - want[1]).max() > 1e-2  # else anything would do


def test_pictures_and_texts_come_out_as_open_clip_embeds_them(runner, checkpoints, photographs):
    where = f"local-dir:{checkpoints['open_clip']}"
    model, _, transform = open_clip.create_model_and_transforms(where)
    tokenize = open_clip.get_tokenizer(where)
    for picture in NAMES:
        with torch.no_grad():
            want = model.eval().encode_image(transform(Image.open(photographs[picture]))[None], normalize=True).numpy()
        assert runner("open_clip").embed(images=[photographs[picture]]) == pytest.approx(want, abs=2e-5)
    with torch.no_grad():
        want = model.encode_text(tokenize(TEXTS), normalize=True).numpy()
    assert runner("open_clip").embed(texts=TEXTS) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize("name", ["hf", "hf2"])
def test_pixels_are_the_processors_within_a_grey_level(name: str, checkpoints, photographs):
    processor = transformers.SiglipImageProcessorPil.from_pretrained(checkpoints[name])
    preparer = ImagePreparer(load(str(checkpoints[name])).towers["image"].preprocess)
    for path in photographs.values():
        want = processor(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"]
        found = preparer.prepare(decode(path.read_bytes()))[0]
        assert np.abs(found - want).max() * 127.5 <= 1.001


def test_the_head_is_a_sigmoid_with_the_checkpoints_scale_and_bias(runner):
    head = runner("hf").bundle.manifest.head
    assert (head.name, head.params["scale"], head.params["bias"]) == ("sigmoid", pytest.approx(np.exp(2.3)), -9.0)


def test_siglips_ids_are_those_of_its_reference_on_500_strings():
    made = _siglip_text.sentencepiece(siglip.DATA / "spiece.model")
    assert len(KNOWN["strings"]) == 500
    assert {s: made.encode(s).ids for s in KNOWN["strings"]} == dict(zip(KNOWN["strings"], KNOWN["ids"], strict=True))


def test_siglip_2s_ids_are_those_of_its_reference_on_500_strings(checkpoints):
    reference = transformers.Siglip2Tokenizer.from_pretrained(checkpoints["hf2"])
    made = Tokenizer.from_str(load(str(checkpoints["hf2"])).files["tokenizer.json"].decode())
    for text in KNOWN["strings"]:
        assert made.encode(text).ids == reference(text)["input_ids"], text


def test_open_clips_ids_are_those_of_its_reference_on_500_strings(checkpoints):
    reference = open_clip.get_tokenizer(f"local-dir:{checkpoints['open_clip']}")
    made = Tokenizer.from_str(load(str(checkpoints["open_clip"])).files["tokenizer.json"].decode())
    for text in KNOWN["strings"]:
        if reference.clean_fn(text) != open_clip.tokenizer.canonicalize_text(text):
            continue  # open_clip repaired its Unicode or its HTML first
        ids = made.encode(text).ids
        ids = ids if len(ids) <= siglip.CONTEXT else [*ids[: siglip.CONTEXT - 1], ids[-1]]
        assert [*ids, *[1] * (siglip.CONTEXT - len(ids))] == reference([text])[0].tolist(), text


@pytest.mark.parametrize("name", ["hf", "hf2"])
def test_too_long_a_text_is_an_error_or_cut_as_the_bundle_says(name: str, checkpoints, tmp_path: Path):
    net = load(str(checkpoints[name]))
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    spec = net.towers["text"].preprocess
    assert isinstance(spec, TextPreprocess)
    long = max(KNOWN["strings"], key=len)
    with pytest.raises(TextTooLong, match="reads at most 64"):
        TextPreparer(spec, tmp_path).prepare([long])
    cut = TextPreparer(spec.model_copy(update={"truncate": True}), tmp_path).prepare([long])["ids"][0].tolist()
    if name == "hf":
        whole = KNOWN["ids"][KNOWN["strings"].index(long)]
        assert cut == [*whole[:63], 1]
    else:
        assert cut == reference_tokenizer(checkpoints[name])([long])[0].tolist()


def changed(checkpoint: Path, target: Path, file: str, **change: object) -> str:
    copy = shutil.copytree(checkpoint, target)
    config = json.loads((copy / file).read_text()) | change
    (copy / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(copy)


def test_a_naflex_checkpoint_is_refused_by_name(checkpoints, tmp_path: Path):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.Siglip2Config(
        text_config={**tower, "vocab_size": 300, **ids}, vision_config={**tower, "num_patches": 16, "patch_size": 8}
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownCheckpoint, match=r"NaFlex kind \(model_type siglip2\)"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_center_crop": True}, "do_center_crop = True"),
        ({"do_resize": False}, "do_resize = False"),
        ({"size": {"height": 64, "width": 64}}, "64 x 64|'height': 64"),
        ({"size": {"shortest_edge": 32}}, "shortest_edge"),
        ({"resample": 1}, "resample = 1"),
    ],
)
def test_another_preprocessing_is_refused_by_name(change: dict, named: str):
    assert image_preprocess({"size": {"height": 32, "width": 32}, "do_center_crop": None}, 32).resample == "bicubic"
    with pytest.raises(UnknownCheckpoint, match=named):
        image_preprocess({"size": {"height": 32, "width": 32}} | change, 32)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hf", "tokenizer.json, or spiece.model"),
        ("hf2", "tokenizer.json, or spiece.model"),
        ("open_clip", "tokenizer.json, or vocab.json with merges.txt, or vocab.txt, or spiece.model"),
    ],
)
def test_a_directory_without_its_tokenizer_says_which_files_it_lacks(
    name: str, files: str, checkpoints, tmp_path: Path
):
    copy = shutil.copytree(checkpoints[name], tmp_path / "lame")
    for file in (*copy.glob("*token*"), *copy.glob("spiece.model")):
        file.unlink()
    with pytest.raises(UnknownCheckpoint, match=f"lame has no tokenizer; expected {files}"):
        load(str(copy))


def test_what_a_tokenizer_cannot_be_is_named(checkpoints, tmp_path: Path):
    left = changed(checkpoints["hf2"], tmp_path / "left", "tokenizer_config.json", padding_side="left")
    with pytest.raises(UnknownCheckpoint, match="padding_side is 'left'"):
        load(left)
    other = shutil.copytree(checkpoints["hf"], tmp_path / "pad")
    (other / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<nowhere>"}}))
    with pytest.raises(UnknownCheckpoint, match="pad_token '<nowhere>'"):
        load(str(other))
    broken = shutil.copytree(checkpoints["hf"], tmp_path / "broken")
    (broken / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UnknownCheckpoint, match=r"spiece\.model is no SentencePiece model"):
        load(str(broken))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"tokenizer_kwargs": {"clean": "wash"}}, "clean is 'wash'"),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "strip_sep_token"),
        ({"tokenizer_mode": "clips"}, "clips"),
    ],
)
def test_open_clips_other_ways_with_texts_are_named(text: dict, named: str, checkpoints, tmp_path: Path):
    config = json.loads((checkpoints["open_clip"] / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text
    other = changed(checkpoints["open_clip"], tmp_path / "other", "open_clip_config.json", **config)
    with pytest.raises(UnknownCheckpoint, match=named):
        load(other)
