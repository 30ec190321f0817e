"""The ranking adapter against its definition in torch (`tests.tiny_layouts.ranking`), on random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calmclip.export import calibrate, parity, samples
from calmclip.export.nets import Net, clip
from calmclip.export.nets.ranking import load, recognise, summary
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests.tiny_layouts.ranking import CONFIG, DIM, QUERIES, SIDE, WORDS, Model

IDS = torch.tensor([[49406, 320, 1125, 539, 49407, *[0] * 72]])


@pytest.fixture(scope="module")
def net(tiny_ranking: Path) -> Net:
    return load(str(tiny_ranking))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def close(ours: Any, theirs: Tensor, bound: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))


@torch.inference_mode()
def test_tokens_and_scores_are_those_of_the_definition(net: Net, model: Model, pixels: Tensor):
    image, text, rank = (net.towers[role].module for role in ("image", "text", "rank"))
    close(image(pixels), model.image_tokens(pixels))
    close(text(IDS), model.text_tokens(IDS))
    want = model(pixels, IDS)
    close(rank(image(pixels), text(IDS)), want)
    assert float(want.std()) > 0.05  # or the comparison means nothing


@torch.inference_mode()
def test_a_pair_of_one_picture_scores_the_biases_of_the_out_projection(net: Net, model: Model, pixels: Tensor):
    """Both halves of the attention cancel, so that each query answers the bias."""
    tokens, text, rank = model.image_tokens(pixels), model.text_tokens(IDS), net.towers["rank"].module
    close(rank.pair(tokens, tokens.flip(0), text), model.adapter.pair(tokens, tokens.flip(0), text))
    biases = QUERIES * model.adapter.reg_token_pooler.out_proj.bias
    head = model.adapter.pair_regressor
    close(rank.pair(tokens, tokens, text), head.output_head(head.pre_linear_block(biases)).expand(len(tokens)))


@torch.inference_mode()
def test_swapped_pictures_negate_the_difference(net: Net, model: Model, pixels: Tensor):
    rank: Any = net.towers["rank"].module
    first = rank.read(model.image_tokens(pixels), model.text_tokens(IDS))
    second = first.flip(0)
    difference = rank.pairs.difference(first, second)
    close(rank.pairs.difference(second, first), -difference, 1e-6)
    assert float(difference.abs().max()) > 0.05


@torch.inference_mode()
def test_the_values_of_learned_words_change_no_score_but_their_number_does(tiny_ranking: Path, model: Model):
    """A token with equal numbers is the bias of its norm."""
    rank: Any = load(str(tiny_ranking)).towers["rank"].module
    tokens = torch.randn(2, 4, DIM), torch.randn(1, 9, DIM)
    before = rank(*tokens)
    rank.words.data = torch.linspace(-3, 3, WORDS)
    close(rank(*tokens), before)
    rank.words.data = torch.zeros(50)
    assert float((rank(*tokens) - before).abs().max()) > 1e-3


@torch.inference_mode()
def test_the_layer_scale_is_folded(net: Net, tiny_ranking: Path, pixels: Tensor):
    unfolded: Any = load(str(tiny_ranking), fold=False).towers["image"].module
    assert sum(name.endswith("scale") for name, _ in unfolded.named_parameters()) == 5  # the blocks of the checkpoint
    folded = net.towers["image"].module
    assert not any(name.endswith("scale") for name, _ in folded.named_parameters())
    close(folded(pixels), unfolded(pixels))


def test_pictures_are_squashed_bilinearly_and_texts_fill_the_context(net: Net):
    spec: Any = net.towers["image"].preprocess
    assert (spec.size, spec.resize, spec.resample, spec.mean[0]) == ((SIDE, SIDE), "exact", "bilinear", 0.48145466)
    assert net.towers["text"].preprocess.feeds() == {"ids": ("int64", ("B", 77))}
    assert net.tasks == ("rank", "raw")


def test_without_a_config_the_sizes_are_the_published_ones(tiny_ranking: Path):
    published = load(str(tiny_ranking / "ranking.safetensors"))
    assert published.towers["image"].preprocess.size == (320, 320)
    assert published.towers["image"].outputs["image_tokens"].shape == ("B", 100, DIM)
    assert published.towers["rank"].module.encoder[0].attn.heads == 8


@torch.inference_mode()
def test_the_config_may_be_open_clips(tiny_ranking: Path, tmp_path: Path, net: Net):
    shutil.copy(tiny_ranking / "ranking.safetensors", tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    assert recognise(str(tmp_path))
    assert not clip.recognise(str(tmp_path))
    assert load(str(tmp_path)).towers["image"].outputs == net.towers["image"].outputs


def test_feeds_of_the_adapter_are_the_towers_answers_for_eight_pictures_and_a_text(net: Net, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    sources = {role: (net.towers[role], parity.torch_run(net.towers[role])) for role in ("image", "text")}
    pictures, texts = samples.pictures()[:10], ["the most cats", "brightness"]
    first, last = calibrate.chained(net.towers["rank"], sources, tmp_path, pictures, texts)
    assert [feed["image_tokens"].shape[0] for feed in (first, last)] == [8, 2]
    (ninth,) = calibrate.feeds(net.towers["image"], tmp_path, pictures[8:9], [])
    assert last["image_tokens"][:1] == pytest.approx(sources["image"][1](ninth)["image_tokens"], abs=1e-6)
    (second,) = calibrate.feeds(net.towers["text"], tmp_path, [], texts[1:])
    tokens = sources["text"][1](second)["text_tokens"]
    assert last["text_tokens"] == pytest.approx(np.concatenate([tokens, tokens]), abs=1e-6)


def test_graphs_are_compared_by_the_scores_of_a_call():
    assert summary({"scores": np.array([1.0, 2.0, 6.0])})["scores"].tolist() == [[1.0, 2.0, 6.0]]


def edited(source: Path, target: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    """A copy of the checkpoint; ``edit`` changes its tensors and its config."""
    state, config = load_file(source / "ranking.safetensors"), json.loads(json.dumps(CONFIG))
    edit(state, config)
    save_file(state, target / "ranking.safetensors")
    (target / "model-config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state, config: state.pop("adapter.reg_ln.weight"), r"adapter\.reg_ln\.weight"),
        (lambda state, config: state.update(odd=torch.zeros(2)), "odd"),
        (lambda state, config: config["vision_cfg"].update(timm_pool="avg"), "timm_pool is 'avg'; only ''"),
        (
            lambda state, config: config["vision_cfg"].update(image_size=80),
            "image_size is 80; expected a multiple of 32",
        ),
        (
            lambda state, config: state.update({"token_embedding.weight": torch.zeros(49408, 32)}),
            r"token_embedding\.weight|positional_embedding",
        ),
        (
            lambda state, config: state.update({"positional_embedding": torch.zeros(77, 32)}),
            "texts have 32 numbers, those of pictures 64",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_ranking: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None], words: str
):
    with pytest.raises(UnknownCheckpoint, match=words):
        load(edited(tiny_ranking, tmp_path, edit))


def test_facts_of_the_recipe_are_refused(tiny_ranking: Path):
    from calmclip.export.checkpoints import Weights

    with pytest.raises(BadRequest, match="leave out the recipe's"):
        load(str(tiny_ranking), Weights(activation="quick_gelu"))
