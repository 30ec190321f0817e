"""The oracles are transformers and open_clip themselves: tokenizer, processor, model, on texts and real photographs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from calmclip.export.checkpoints import read
from calmclip.export.nets.clip import load
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.runner import Runner
from tests import tiny
from tests.tiny_layouts import bert, sealed

TEXTS = ["a photo of a red cat.", "一只猫的照片", "two dogs!", "a", "Two  BLUE cats, 两只狗。 naïve? " * 2]
PICTURES = ("cat", "astronaut", "rocket", "coffee")  # wide, square, tall


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


def export(checkpoint: Path, out: Path) -> Runner:
    return sealed.runner(load(str(checkpoint)), out, checkpoint.name.lower())


def features(found) -> np.ndarray:  # type: ignore[no-untyped-def]
    return normalize(getattr(found, "pooler_output", found), dim=-1).detach().numpy()


def close(found: np.ndarray, want: np.ndarray) -> None:
    assert float(np.abs(found - want).max()) <= 1e-4


def same_pixels(spec: ImagePreprocess, path: Path, want: np.ndarray) -> None:
    """Within one grey level, which is 1 / 255 before the division by std."""
    pixels = ImagePreparer(spec).prepare(decode(path.read_bytes()))[0]
    assert float(np.abs((pixels - want) * np.array(tiny.STD)[:, None, None]).max()) <= 1 / 255 + 1e-6


@pytest.fixture(scope="module", params=["hf_chinese_clip", "altclip_resaved"])
def hugging_face(request: pytest.FixtureRequest, folder: Path):
    checkpoint = getattr(bert, request.param)(folder / request.param)
    kind = transformers.ChineseCLIPModel if "chinese" in request.param else transformers.AltCLIPModel
    return checkpoint, export(checkpoint, folder / "bundles"), kind.from_pretrained(checkpoint).eval()


def test_texts_come_out_as_transformers_embeds_them_alone_and_in_a_batch(hugging_face):
    checkpoint, runner, reference = hugging_face
    tokenize = transformers.AutoTokenizer.from_pretrained(checkpoint)
    together = runner.embed(texts=TEXTS)
    padded = tokenize(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    close(together, features(reference.get_text_features(**padded)))
    for text, row in zip(TEXTS, together, strict=True):
        alone = tokenize([text], return_tensors="pt", return_token_type_ids=False)
        close(row[None], features(reference.get_text_features(**alone)))
        assert float(np.abs(runner.embed(texts=[text])[0] - row).max()) <= 1e-6


def test_altclip_in_the_names_of_its_publication_is_the_same(folder: Path):
    published, resaved = (load(str(make(folder / make.__name__))) for make in (bert.altclip, bert.altclip_resaved))
    for role, tower in published.towers.items():
        for name, tensor in resaved.towers[role].module.state_dict().items():
            assert torch.equal(tower.module.state_dict()[name], tensor)


def test_pictures_come_out_as_transformers_embeds_them(hugging_face, photographs):
    checkpoint, runner, reference = hugging_face
    chinese = isinstance(reference, transformers.ChineseCLIPModel)
    processors = (transformers.ChineseCLIPImageProcessorPil, transformers.CLIPImageProcessorPil)
    processor = processors[not chinese].from_pretrained(checkpoint)
    for name in PICTURES:
        pixels = processor(Image.open(photographs[name]).convert("RGB"), return_tensors="pt")["pixel_values"]
        same_pixels(runner.bundle.manifest.graphs["image"].preprocess, photographs[name], pixels[0].numpy())
        close(runner.embed(images=[photographs[name]]), features(reference.get_image_features(pixel_values=pixels)))


def test_chinese_clip_of_its_authors_comes_out_as_its_definition_says(folder, photographs):
    from torchvision import transforms

    runner = export(bert.chinese_clip(folder / "chinese_clip"), folder / "bundles")
    reference = bert.chinese_clip_module()
    tokenize = transformers.BertTokenizer(str(folder / "chinese_clip" / "vocab.txt"))
    with torch.no_grad():
        ids = tokenize(TEXTS, padding="max_length", max_length=52, return_tensors="pt")["input_ids"]
        close(runner.embed(texts=TEXTS), normalize(reference.encode_text(ids), dim=-1).numpy())
        prepare = transforms.Compose([
            transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(), transforms.Normalize(tiny.MEAN, tiny.STD),
        ])  # fmt: skip
        for name in PICTURES:
            pixels = prepare(Image.open(photographs[name]).convert("RGB"))
            same_pixels(runner.bundle.manifest.graphs["image"].preprocess, photographs[name], pixels.numpy())
            want = normalize(reference.visual(pixels[None]), dim=-1).numpy()
            close(runner.embed(images=[photographs[name]]), want)


@pytest.fixture(scope="module")
def xlmr(folder: Path):
    checkpoint = bert.open_clip_bert(folder / "oc")
    module, _ = bert.open_clip_bert_module(folder / "text-config", "xlm-roberta", "mean_pooler", "mlp")
    return checkpoint, module


def test_open_clip_with_xlmr_comes_out_as_open_clip_embeds_it(xlmr, folder, photographs):
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import image_transform

    checkpoint, reference = xlmr
    runner = export(checkpoint, folder / "bundles")
    with torch.no_grad():
        ids = HFTokenizer(str(checkpoint), context_length=77)(TEXTS)
        close(runner.embed(texts=TEXTS), reference.encode_text(ids, normalize=True).numpy())
        prepare = image_transform(32, is_train=False, mean=tiny.MEAN, std=tiny.STD)
        for name in PICTURES:
            pixels = prepare(Image.open(photographs[name]))
            same_pixels(runner.bundle.manifest.graphs["image"].preprocess, photographs[name], pixels.numpy())
            close(
                runner.embed(images=[photographs[name]]), reference.encode_image(pixels[None], normalize=True).numpy()
            )


@pytest.mark.parametrize(
    ("kind", "pooler", "projection", "config_beside"),
    [
        ("roberta", "mean_pooler", "mlp", False),
        ("roberta", "mean_pooler", "linear", True),
        ("bert", "cls_pooler", "linear", False),
        ("bert", "cls_last_hidden_state_pooler", "mlp", False),
        ("bert", "cls_last_hidden_state_pooler", None, True),
        ("xlm-roberta", "cls_pooler", "mlp", True),
    ],
)
def test_every_pooler_and_projection_of_open_clip(kind, pooler, projection, config_beside, tmp_path: Path):
    width = 32 if config_beside else 64  # heads of another width than 64 only a config can tell
    clip, config = bert.open_clip_bert_module(tmp_path / "text", kind, pooler, projection, width=width)
    if config_beside:
        shutil.copytree(tmp_path / "text", tmp_path / "oc")
    bert.xlmr_tokenizer(tmp_path / "oc")
    text = load(str(bert.save_open_clip(tmp_path / "oc", clip, config))).towers["text"].module
    pad = 0 if kind == "bert" else 1
    ids = torch.randint(5, 300, (3, 12))
    ids[0, 7:], ids[1, 11:] = pad, pad
    with torch.no_grad():  # in float64, so that a difference is one of meaning
        want = clip.double().encode_text(ids, normalize=True)
        assert torch.allclose(text.double()(ids, (ids != pad).double()), want, atol=1e-6)


def test_padding_changes_nothing(xlmr):
    """Nor does what stands in the padding: it is masked."""
    text = load(str(xlmr[0])).towers["text"].module
    ids, mask = torch.randint(5, 300, (4, 9)), torch.ones(4, 9, dtype=torch.int64)
    with torch.no_grad():
        want = text(ids, mask)
        for more in (1, 7, 40):
            longer = torch.cat([ids, torch.randint(0, 300, (4, more))], dim=1)
            found = text(longer, torch.cat([mask, torch.zeros(4, more, dtype=torch.int64)], dim=1))
            assert torch.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(("layers", "width"), [(1, 64), (3, 192)])
def test_any_depth_and_width_is_read(layers: int, width: int, tmp_path: Path):
    """As students have them: heads are 64 wide where no config says otherwise."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    config = transformers.BertConfig(**bert.TOWER | sizes, vocab_size=len(bert.WORDPIECE))
    clip = bert.chinese_clip_module()
    clip.bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    tiny.spread(clip.bert)
    clip.text_projection = torch.nn.Parameter(torch.randn(width, 16))
    bert.vocab_txt(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "clip_cn.pt")
    text = load(str(tmp_path)).towers["text"].module
    ids = torch.randint(5, 60, (2, 6))
    with torch.no_grad():
        assert torch.allclose(text(ids, torch.ones_like(ids)), normalize(clip.encode_text(ids), dim=-1), atol=2e-6)


def test_a_missing_vocabulary_says_which_file_to_put_where(folder: Path, tmp_path: Path):
    shutil.copy(bert.chinese_clip(folder / "lame") / "clip_cn.pt", tmp_path)
    with pytest.raises(UnknownCheckpoint, match=rf"{tmp_path.name} has no tokenizer; put the .*vocab\.txt"):
        load(str(tmp_path))


def test_the_vocabulary_of_another_model_is_refused(folder: Path, tmp_path: Path):
    copy = shutil.copytree(bert.chinese_clip(folder / "other"), tmp_path / "other")
    with (copy / "vocab.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"word{i}\n" for i in range(40))
    with pytest.raises(UnknownCheckpoint, match=r"tokenizer has \d+ tokens, but \S+ \d+ rows"):
        load(str(copy))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hf_pooler_type": "max_pooler"}, "hf_pooler_type is 'max_pooler'"),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs"),
        ({"output_tokens": True}, "output_tokens is True"),
    ],
)
def test_what_is_not_supported_is_named(xlmr, tmp_path: Path, change: dict, what: str):
    copy = shutil.copytree(xlmr[0], tmp_path / "other")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= change
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownCheckpoint, match=what):
        load(str(copy))


@pytest.mark.parametrize("name", ["google/mt5-base", "facebook/nllb-200-distilled-600M"])
def test_text_towers_of_another_kind_are_refused_by_name(xlmr, tmp_path: Path, name: str):
    from safetensors.torch import save_file

    from calmclip.export.recipe import recognise

    copy = shutil.copytree(xlmr[0], tmp_path / "other")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = name
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {
        n.replace("text.transformer.embeddings", "text.transformer.shared"): t for n, t in read(copy).tensors.items()
    }
    save_file(tensors, copy / "open_clip_model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=f"its text tower is {name}"):
        recognise(str(copy))
