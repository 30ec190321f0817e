"""Learnt rows in every text. Oracles: the text itself, where the rows are embeddings of real tokens; CoOp's definition
on transformers' layers; prompts that peft puts before the text."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from calmclip.export import pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny, tuned
from tests.tiny_layouts import decoders, sealed, siglip

START, END, WIDTH = tiny.START, tiny.END, 32
NETS = {  # base -> net
    "clip": "clip", "highest": "clip", "siglip": "clip", "mean": "bert", "first": "bert", "llama": "decoder",
    "gemma": "decoder", "chosen": "decoder",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    clip = tiny.hf_clip(folder / "clip")
    return {
        "clip": clip,
        "highest": tiny.changed(clip, folder / "highest", text_config={"eos_token_id": 2}),  # pools the highest id
        "siglip": siglip.hf_siglip(folder / "siglip"),
        "mean": tiny.sentences(folder / "mean", "mean_tokens"),
        "first": tiny.sentences(folder / "first", "cls_token"),
        "llama": decoders.decoder(folder / "llama"),  # pools the last token
        "gemma": decoders.sentence_modules(decoders.decoder(folder / "gemma", "gemma"), "mean"),
        "chosen": decoders.sentence_modules(decoders.decoder(folder / "chosen"), "mean", include_prompt=False),
    }


def net(base: str, bases: dict[str, Path], rows: Path | None = None, **params: Any) -> Net:
    """Ready to be traced."""
    adapters = [Adapt(name="prefix", params={"checkpoint": str(rows), **params})] if rows else []
    return pipeline.load(NETS[base], str(bases[base]), Weights(), adapters)


def saved(rows: torch.Tensor, file: Path, name: str = "ctx") -> Path:
    save_file({name: rows.detach().clone()}, file)
    return file


def drawn(number: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(0))


def vectors(net: Net, ids: list[list[int]], mask: list[list[int]] | None = None) -> torch.Tensor:
    inputs = [{"ids": ids}.get(name, mask) for name in net.towers["text"].inputs]
    with torch.inference_mode():
        return net.towers["text"].module(*map(torch.tensor, inputs))


def spec(net: Net) -> TextPreprocess:
    tokens = net.towers["text"].preprocess
    assert isinstance(tokens, TextPreprocess)
    return tokens


@pytest.mark.parametrize("place", ["after_start", "before"])
@pytest.mark.parametrize("base", ["clip", "highest", "siglip", "mean", "llama", "gemma", "chosen"])
def test_rows_of_real_tokens_are_the_text_with_these_tokens(
    base: str, place: str, bases: dict[str, Path], tmp_path: Path
):
    """SigLIP's tower pools the last of as many tokens as its context has."""
    plain = net(base, bases)
    module = plain.towers["text"].module  # it is folded, so that the table holds what the blocks read
    rows = saved(module.tokens.weight[[7, 8, 9]], tmp_path / "rows.safetensors")
    prefixed = net(base, bases, rows, place=place)
    fixed = spec(prefixed).pad == "context"
    texts = [[START, 1, 2, 3, END], [START, 4, END, 0, 0]]
    masks = [[1] * 5, [1] * 3 + [0] * 2]
    texts = [[*text, *[1] * (spec(prefixed).context - 5)] for text in texts] if fixed else texts
    at = 1 if place == "after_start" else 0
    longer = [[*text[:at], 7, 8, 9, *text[at:]] for text in texts]
    wanted = vectors(plain, longer, [[1, 1, 1, *mask] for mask in masks])
    assert torch.allclose(vectors(prefixed, texts, masks), wanted, atol=1e-6)
    assert wanted[0] @ wanted[1] < 0.99
    assert spec(prefixed).context == spec(plain).context - 3
    assert prefixed.towers["text"].inputs["ids"].shape[1] == (spec(prefixed).context if fixed else "T")
    where = {"after_start": "behind the first token", "before": "before the text"}[place]
    assert prefixed.source.notes.endswith(f"; 3 learnt rows of rows.safetensors {where}")
    assert prefixed.source.weights.keys() >= {"prefix/rows.safetensors"}


@pytest.mark.parametrize("base", ["clip", "highest", "mean", "first", "llama", "chosen"])
def test_a_row_depends_neither_on_its_padding_nor_on_its_batch(base: str, bases: dict[str, Path], tmp_path: Path):
    prefixed = net(base, bases, saved(drawn(4), tmp_path / "rows.safetensors"))
    alone = vectors(prefixed, [[START, 5, END]], [[1] * 3])
    for pad in (1, 9):
        others = [[START, *range(1, pad + 2), END], [START, 5, END, *[0] * pad]]
        masks = [[1] * (pad + 3), [1] * 3 + [0] * pad]
        assert torch.allclose(vectors(prefixed, others, masks)[1], alone[0], atol=1e-6)


def test_the_longest_text_fills_the_table_of_positions(bases: dict[str, Path], tmp_path: Path):
    prefixed = net("clip", bases, saved(drawn(4), tmp_path / "rows.safetensors"))
    text = [START, *[5] * (spec(prefixed).context - 2), END]
    assert len(text) == 36
    assert vectors(prefixed, [text]).isfinite().all()


def coop(checkpoint: Path, rows: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The vector of start, rows, text, end by transformers' layers."""
    model: Any = transformers.CLIPModel.from_pretrained(checkpoint)
    text, length = model.text_model, len(rows) + len(ids)
    with torch.inference_mode():
        words = text.embeddings.token_embedding(torch.tensor(ids))
        x = torch.cat([words[:1], rows, words[1:]])[None] + text.embeddings.position_embedding.weight[:length]
        for layer in text.encoder.layers:
            x = layer(x, attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None])
        return F.normalize(model.text_projection(text.final_layer_norm(x)[0, -1]), dim=0)


def test_clips_prompts_are_those_of_coops_definition(bases: dict[str, Path], tmp_path: Path):
    """The file is as Dassl saves it, with the tokens that are not learnt."""
    rows, ids = drawn(4), [START, 1, 2, END]
    frozen = {"token_prefix": torch.ones(3, 1, WIDTH), "token_suffix": torch.ones(3, 35, WIDTH)}
    torch.save({"state_dict": {"prompt_learner.ctx": rows, **frozen}, "epoch": 50}, tmp_path / "model.pth.tar-50")
    prefixed = net("clip", bases, tmp_path / "model.pth.tar-50")
    assert torch.allclose(vectors(prefixed, [ids])[0], coop(bases["clip"], rows, ids), atol=1e-5)


@pytest.mark.slow
def test_a_bundle_of_clip_with_lora_and_rows_embeds_texts_of_any_length(bases: dict[str, Path], tmp_path: Path):
    config = {"target_modules": ["q_proj", "fc1", "token_embedding"], "use_rslora": True}
    lora, rows = tuned.lora(bases["clip"], tmp_path / "lora", "CLIPModel", **config), drawn(4)
    params = {"lora": lora, "prefix": saved(rows, tmp_path / "rows.safetensors")}
    adapters = [Adapt(name=name, params={"checkpoint": str(path)}) for name, path in params.items()]
    adapted = pipeline.load("clip", str(bases["clip"]), Weights(), adapters)
    texts = ["cat", "a photo of two red cat", " ".join(["dog"] * 34)]
    embedded = sealed.runner(adapted, tmp_path, "tuned-float").embed(texts=texts)
    merged = tuned.merged(bases["clip"], [lora], tmp_path / "merged", "CLIPModel")
    wanted = torch.stack([coop(merged, rows, tiny.tokenizer().encode(text).ids) for text in texts])
    assert np.allclose(embedded, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("base", ["mean", "first", "llama", "gemma"])
def test_prompts_of_peft_stand_before_the_text(kind: str, base: str, bases: dict[str, Path], tmp_path: Path):
    config = getattr(peft, kind)(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    model = tuned.prompts(bases[base], tmp_path / "prompts", "AutoModel", config)
    prefixed = net(base, bases, tmp_path / "prompts")
    ids, mask = [[START, 1, 2, END], [START, 3, END, 0]], [[1] * 4, [1] * 3 + [0]]
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    weights = torch.tensor([[1] * 3 + row for row in mask])[..., None]
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    pooled = {"first": hidden[:, 0], "llama": hidden[[0, 1], [6, 5]]}.get(base, pooled)
    assert torch.allclose(vectors(prefixed, ids, mask), F.normalize(pooled, dim=1), atol=1e-6)
    assert prefixed.source.notes.endswith("3 learnt rows of prompts before the text")
    assert prefixed.source.weights.keys() >= {"prefix/adapter_model.safetensors"}


@pytest.mark.parametrize("place", ["after_start", "before"])
@pytest.mark.parametrize("base", ["llama", "chosen"])
def test_padding_before_a_text_changes_nothing(base: str, place: str, bases: dict[str, Path], tmp_path: Path):
    prefixed = net(base, bases, saved(drawn(4), tmp_path / "rows.safetensors"), place=place)
    ids, mask = [[START, 1, 2, END, 0, 0, 0], [START, *[3] * 5, END]], [[1] * 4 + [0] * 3, [1] * 7]
    left, left_mask = [[0, 0, 0, *ids[0][:4]], ids[1]], [[0] * 3 + [1] * 4, mask[1]]
    assert torch.allclose(vectors(prefixed, left, left_mask), vectors(prefixed, ids, mask), atol=1e-6)


def test_a_mean_takes_the_rows_unless_they_are_left_out(bases: dict[str, Path], tmp_path: Path):
    """By transformers, whose model takes embeddings in place of ids."""
    rows, ids = drawn(4), [START, 1, 2, END]
    model = decoders.reference(bases["chosen"])
    with torch.inference_mode():
        words = model.embed_tokens(torch.tensor(ids))
        hidden = model(inputs_embeds=torch.cat([words[:1], rows, words[1:]])[None]).last_hidden_state[0]
    file = saved(rows, tmp_path / "rows.safetensors")
    for left_out, pooled in ((False, hidden), (True, hidden[[0, 5, 6, 7]])):
        prefixed = net("chosen", bases, file, left_out=left_out)
        wanted = F.normalize(pooled.mean(0), dim=0)
        assert torch.allclose(vectors(prefixed, [ids], [[1] * 4])[0], wanted, atol=1e-5)


def test_rows_in_an_array_of_numpy(bases: dict[str, Path], tmp_path: Path):
    rows = drawn(2)
    np.save(tmp_path / "rows.npy", rows.numpy().astype(np.float64)[None])
    by_array, by_tensors = (
        vectors(net("clip", bases, file), [[START, 1, END]])
        for file in (tmp_path / "rows.npy", saved(rows, tmp_path / "rows.safetensors", "anything"))
    )
    assert torch.equal(by_array, by_tensors)


def test_files_that_hold_no_rows_of_this_tower(bases: dict[str, Path], tmp_path: Path):
    files: dict[str, Path] = {}
    for name, rows in {
        "wide": drawn(2, 33),
        "flat": drawn(2)[0],
        "none": drawn(0),
        "classes": drawn(4).reshape(2, 2, 32),
    }.items():
        files[name] = saved(rows, tmp_path / f"{name}.safetensors")
    files["nan"] = saved(drawn(2) / 0, tmp_path / "nan.safetensors")
    files["several"] = tmp_path / "several.safetensors"
    save_file({"a": drawn(2), "b": drawn(2)}, files["several"])
    (tmp_path / "text.npy").write_text("rows")
    np.save(tmp_path / "words.npy", np.array([["a"] * 32]))
    tuned.prompts(
        bases["mean"],
        tmp_path / "deep",
        "AutoModel",
        peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    )
    for file, message in {
        files["wide"]: r"ctx has the shape \[2, 33\]; expected \[any, 32\], finite",
        files["flat"]: r"ctx has the shape \[32\]; expected",
        files["none"]: r"ctx has the shape \[0, 32\]; expected",
        files["classes"]: r"ctx has the shape \[2, 2, 32\]; expected",
        files["nan"]: r"ctx has the shape \[2, 32\]; expected \[any, 32\], finite",
        files["several"]: "holds 2 tensors; expected learnt rows alone, or with the name ctx or prompt_embeddings",
        tmp_path / "text.npy": r"text\.npy is no array of numbers that numpy saved",
        tmp_path / "words.npy": r"words\.npy is no array of numbers that numpy saved",
        tmp_path / "deep": "peft_type is 'PREFIX_TUNING'; expected PROMPT_TUNING or P_TUNING",
        tmp_path / "absent.safetensors": "does not exist",
    }.items():
        with pytest.raises(UnknownCheckpoint, match=message):
            net("clip", bases, file)


def test_requests_that_do_not_fit_the_net(bases: dict[str, Path], tmp_path: Path):
    rows = saved(drawn(38), tmp_path / "rows.safetensors")
    with pytest.raises(BadRequest, match="38 rows leave 2 of 40 tokens; a text needs 3"):
        net("clip", bases, rows)
    with pytest.raises(BadRequest, match="left_out needs a tower whose mean is over chosen tokens"):
        net("mean", bases, rows, left_out=True)
    opt, adapter = tiny.opt(tmp_path / "opt"), Adapt(name="prefix", params={"checkpoint": str(rows)})
    with pytest.raises(BadRequest, match="expected a text tower of vectors"):
        pipeline.load("opt", str(opt), Weights(), [adapter])


def test_adapters_after_it(bases: dict[str, Path], tmp_path: Path):
    """Its rows are in the table of tokens, so adapters that edit tensors come first."""
    prefix = Adapt(name="prefix", params={"checkpoint": str(saved(drawn(2), tmp_path / "rows.safetensors"))})
    lora = tuned.lora(bases["clip"], tmp_path / "lora", "CLIPModel", target_modules=["fc1"])
    edit = Adapt(name="lora", params={"checkpoint": str(lora)})
    with pytest.raises(BadRequest, match="the tensors of clip can be edited before prefix; change the order"):
        pipeline.load("clip", str(bases["clip"]), Weights(), [prefix, edit])
    for name, params in {"stretch": {"tokens": 60}, "attribution": {"on": True}, "prefix": prefix.params}.items():
        with pytest.raises(BadRequest, match=name):
            pipeline.load("clip", str(bases["clip"]), Weights(), [prefix, Adapt(name=name, params=params)])
    both = pipeline.load("clip", str(bases["clip"]), Weights(), [edit, prefix])
    assert both.adapters == ("lora", "prefix")
