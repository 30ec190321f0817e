"""AnomalyCLIP over a tiny CLIP with random weights. The oracle is its definition in torch, over open_clip's module; the
prompts of real tokens are `encode_text`'s."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import parity
from calmclip.export.adapters import Adapt, Context, adapt, anomaly
from calmclip.export.checkpoints import Weights
from calmclip.export.layouts.common.clip_bpe import tokenizer_json
from calmclip.export.nets import NETS, Net, ready
from calmclip.export.trace import to_onnx
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny

DIM, TEXT, SIZE = 16, 64, 40  # of a vector, of a text token, pixels of a picture: 5 x 5 patches, 4 x 4 in training
LEARNT, DEEP = 3, 2  # tokens of a prompt, and of each deep prompt
NAMES = {"pos": "object.", "neg": "damaged object."}
TOKENIZER = Tokenizer.from_str(tokenizer_json().decode())


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": TEXT, "heads": 1, "layers": 3}
    return tiny.spread(CLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=text, quick_gelu=True)).eval()


@pytest.fixture(scope="module")
def base(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "clip.pt"
    marks = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    torch.save({**clip.state_dict(), **{name: torch.tensor(value) for name, value in marks.items()}}, file)
    return file


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def prompts(clip: Any, learnt: dict[str, Tensor], deep: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of the prompt learner, as its code names and shapes them. ``learnt``: the tokens of each side."""
    state = {f"compound_prompts_text.{i}": rows for i, rows in enumerate(deep)}
    for side, name in NAMES.items():
        row = torch.zeros(77, dtype=torch.long)
        filled = [49406, *[ids("X")[1]] * len(learnt[side]), *ids(name)[1:]]
        row[: len(filled)] = torch.tensor(filled)
        embedded = clip.token_embedding(row).detach()
        state |= {
            f"ctx_{side}": learnt[side][None, None],
            f"token_prefix_{side}": embedded[None, None, :1],
            f"token_suffix_{side}": embedded[None, None, 1 + len(learnt[side]) :],
            f"tokenized_prompts_{side}": row[None],
        }
    return state


@pytest.fixture(scope="module")
def net(base: Path) -> Net:
    """The base, before it is folded."""
    unfolded = NETS.get("clip").unfolded
    assert unfolded is not None
    return unfolded(str(base), Weights.model_validate({"activation": "quick_gelu"}))


@pytest.fixture(scope="module")
def random(clip: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    learnt = {side: torch.randn(LEARNT, TEXT) for side in NAMES}
    return prompts(clip, learnt, [torch.randn(DEEP, TEXT) for _ in range(2)])


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"prompt_learner": state}, folder / "prompts.pth")
    return folder / "prompts.pth"


def adapted(net: Net, prompts: Path, **params: Any) -> Net:
    adapter = Adapt(name="anomaly", params={"checkpoint": str(prompts), "size": SIZE, **params})
    return adapt(net, [adapter], Context(lambda net, tower: []))


def text_vectors(clip: Any, state: dict[str, Tensor]) -> Tensor:
    """[2, D]: normal and damaged, by the definition: the tokens behind the first are replaced before blocks 1, 2, …"""
    rows = []
    for side in NAMES:
        x = torch.cat([state[f"{part}_{side}"][0, 0] for part in ("token_prefix", "ctx", "token_suffix")])
        x = (x + clip.positional_embedding)[None]
        for number, block in enumerate(clip.transformer.resblocks):
            if number and f"compound_prompts_text.{number - 1}" in state:
                deep = state[f"compound_prompts_text.{number - 1}"]
                x = torch.cat([x[:, :1], deep[None], x[:, 1 + len(deep) :]], dim=1)
            x = block(x, attn_mask=clip.attn_mask)
        end = int(state[f"tokenized_prompts_{side}"].argmax())
        rows.append(clip.ln_final(x)[:, end] @ clip.text_projection)
    return F.normalize(torch.cat(rows), dim=-1)


def image_answers(
    clip: Any, pixels: Tensor, sides: Tensor, blocks: int, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The map, with (S_abn + 1 - S_norm) / 2, and the score, by the definition."""
    visual = clip.visual
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    table = visual.positional_embedding
    grid = F.interpolate(table[1:].T.reshape(1, 128, 4, 4), (5, 5), mode="bilinear").reshape(128, 25).T
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + torch.cat([table[:1], grid])
    x = visual.ln_pre(x)
    beside, maps, resblocks = x, [], visual.transformer.resblocks
    for number, block in enumerate(resblocks, 1):
        tokens, attention = block.ln_1(x), block.attn
        v = tokens @ attention.in_proj_weight[256:].T + attention.in_proj_bias[256:]
        v = v.unflatten(-1, (2, 64)).transpose(1, 2)
        vv = torch.softmax(v @ v.transpose(-1, -2) * 64**-0.5, dim=-1) @ v
        x = block(x)
        beside = beside + attention.out_proj(vv.transpose(1, 2).flatten(2)) if number > len(resblocks) - blocks else x
        if number in layers:
            patches = F.normalize(visual.ln_post(beside) @ visual.proj, dim=-1)[:, 1:]
            normal, damaged = torch.softmax(patches @ sides.T / 0.07, dim=-1).unbind(-1)
            maps.append((damaged + 1 - normal) / 2)
    whole = F.normalize(x[:, 0] @ visual.proj, dim=-1)
    return torch.stack(maps).mean(0).unflatten(1, (5, 5)), torch.softmax(whole @ sides.T / 0.07, dim=-1)[:, 1]


@pytest.mark.parametrize(
    ("blocks", "layers", "traced"),
    [(2, (), False), (1, (1, 2, 3), False), pytest.param(19, (1, 3), True, marks=pytest.mark.slow)],
)
@torch.inference_mode()
def test_map_and_score_are_those_of_the_definition(
    clip: Any,
    net: Net,
    random: dict[str, Tensor],
    tmp_path: Path,
    blocks: int,
    layers: tuple[int, ...],
    traced: bool,
):
    tower = ready(adapted(net, saved(random, tmp_path), blocks=blocks, layers=layers)).towers["anomaly"]
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    sides = text_vectors(clip, random)
    plane, score = image_answers(clip, pixels, sides, min(blocks, 3), layers or (3,))
    answer = parity.onnx_run(to_onnx(tower))({"pixels": pixels.numpy()}) if traced else None
    answers = map(torch.from_numpy, (answer["map"], answer["score"])) if answer else tower.module(pixels)
    for given, wanted in zip(answers, (plane, score), strict=True):
        assert (given - wanted).abs().max() < 1e-4
    assert plane.std() > 0.01


@torch.inference_mode()
def test_prompts_of_real_tokens_are_encoded_as_texts(clip: Any, net: Net, tmp_path: Path):
    words = {"pos": "a photo of an", "neg": "a picture of a"}
    learnt = {side: clip.token_embedding(torch.tensor(ids(text)[1:-1])) for side, text in words.items()}
    answer = adapted(net, saved(prompts(clip, learnt, []), tmp_path))
    rows = torch.zeros(2, 77, dtype=torch.long)
    for row, side in zip(rows, NAMES, strict=True):
        filled = ids(f"{words[side]} {NAMES[side]}")
        row[: len(filled)] = torch.tensor(filled)
    normal, damaged = F.normalize(clip.encode_text(rows), dim=-1)
    along = answer.towers["anomaly"].module.along
    assert (along - (damaged - normal) / 0.07).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ctx_neg": None}, "lacks prompt_learner.ctx_neg"),
        ({"other": torch.ones(2)}, "holds other, which is no tensor of AnomalyCLIP"),
        ({"compound_prompts_text.0": None}, "lacks prompt_learner.compound_prompts_text.0, and has 1 deep"),
        ({"ctx_pos": torch.ones(1, 1, 3, 5)}, r"ctx_pos has the shape \[1, 1, 3, 5\]; expected \[any, 64\]"),
        ({"token_suffix_pos": torch.ones(1, 1, 73, 64)}, "token_suffix_pos has no token that ends a text"),
        ({"compound_prompts_text.2": torch.ones(2, 64)}, "3 deep prompts do not fit a text tower of 77 tokens and 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    net: Net, random: dict[str, Tensor], tmp_path: Path, changed: dict[str, Tensor | None], says: str
):
    state = {name: tensor for name, tensor in {**random, **changed}.items() if tensor is not None}
    with pytest.raises(UnknownCheckpoint, match=says):
        adapted(net, saved(state, tmp_path))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"size": 41}, "size is 41; expected a multiple of 8"),
        ({"layers": "1,4"}, r"layers are \[1, 4\]; expected distinct numbers from 1 to 3"),
    ],
)
def test_params_that_do_not_fit_are_refused(
    net: Net, random: dict[str, Tensor], tmp_path: Path, params: dict[str, Any], says: str
):
    with pytest.raises(BadRequest, match=says):
        adapted(net, saved(random, tmp_path), **params)


def test_the_net_serves_the_task_and_keeps_its_own_towers(net: Net, random: dict[str, Tensor], tmp_path: Path):
    answer = adapted(net, saved(random, tmp_path))
    tower = answer.towers["anomaly"]
    assert answer.tasks == (*net.tasks, "anomaly")
    assert (tower.preprocess.size, tower.preprocess.resize) == ((SIZE, SIZE), "exact")
    assert answer.towers["image"].module is net.towers["image"].module
    weights = {id(tensor) for tensor in net.towers["image"].module.parameters()}
    assert [name for name, tensor in tower.module.named_parameters() if id(tensor) not in weights] == ["along"]


def test_two_maps_are_compared_by_their_logits():
    """The logit of 1 / (1 + exp(-x)) is x."""
    rows = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    odds = 1 / (1 + np.exp(-rows))
    compared = anomaly.summary({"score": odds[:, 0], "map": odds[:, 1:].reshape(2, 2, 2)})
    assert compared["damage"] == pytest.approx(rows, abs=1e-5)
