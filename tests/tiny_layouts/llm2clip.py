"""Tiny LLM2CLIP and ProCLIP checkpoints: an image tower, and an adaptor over vectors of 24 numbers; and the adaptor by
its formula, in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.tiny_layouts import siglip, trunks

WIDTH = 24
START, INSIDE = "text.text_adaptor.", "text.text_proj.text_adaptor."
OPENAI: dict[str, Any] = {
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
    "text_cfg": {"use_embedding": True},
}


def adaptor_state(
    embed: int, *, blocks: int = 4, times: int = 2, seed: int = 7, start: str = START
) -> dict[str, Tensor]:
    """Norms are not 1 and 0, and no branch is small. ``times``: how much wider a block is inside."""
    torch.manual_seed(seed)
    hidden, state = times * WIDTH, {}
    for i in range(blocks):
        for name, shape in (("fn.0", (hidden, WIDTH)), ("fn.3", (WIDTH, hidden))):
            state[f"{i}.{name}.weight"] = torch.randn(shape) * 1.2 * shape[1] ** -0.5
            state[f"{i}.{name}.bias"] = 0.3 * torch.randn(shape[0])
        state |= {f"{i}.ln.{name}": tensor for name, tensor in _norm().items()}
    state |= {f"{blocks}.{name}": tensor for name, tensor in _norm().items()}
    state |= {f"{blocks + 1}.weight": torch.randn(embed, WIDTH) * WIDTH**-0.5, f"{blocks + 1}.bias": torch.randn(embed)}
    state[f"{blocks + 1}.bias"] *= 0.2
    return {start + name: tensor for name, tensor in state.items()}


def _norm() -> dict[str, Tensor]:
    return {"weight": 1 + 0.3 * torch.randn(WIDTH), "bias": 0.3 * torch.randn(WIDTH)}


def adaptor(state: dict[str, Tensor], vectors: Tensor, *, start: str = START, normalize: bool = True) -> Tensor:
    """n x [x + Linear(GELU(Linear(LN(x))))], LN, Linear: float64 [B, embed], before it is a unit vector."""
    wide = {name.removeprefix(start): t.double() for name, t in state.items() if name.startswith(start)}
    blocks = sum(name.endswith("fn.0.weight") for name in wide)
    x = vectors.double()
    x = x / x.norm(dim=-1, keepdim=True) if normalize else x

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * wide[f"{name}.weight"] + wide[f"{name}.bias"]

    for i in range(blocks):
        inner = norm(x, f"{i}.ln") @ wide[f"{i}.fn.0.weight"].T + wide[f"{i}.fn.0.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + inner @ wide[f"{i}.fn.3.weight"].T + wide[f"{i}.fn.3.bias"]
    return norm(x, str(blocks)) @ wide[f"{blocks + 1}.weight"].T + wide[f"{blocks + 1}.bias"]


def vectors(count: int, seed: int = 0, dim: int = WIDTH) -> np.ndarray[Any, Any]:
    """float32 [count, dim], of lengths that are not 1."""
    return (3 * np.random.default_rng(seed).standard_normal((count, dim))).astype(np.float32)


def image_module() -> Any:
    """OpenAI's image tower, in a CLIP whose text tower is not used."""
    return tiny.openai_module(seed=3)


def _image(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if name.startswith("visual.") or name.startswith("logit_")}


def _file(directory: Path, state: dict[str, Tensor], name: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / name)
    return directory / name


def llm2clip(directory: Path) -> Path:
    """OpenAI's ViT, as a directory with open_clip's config, which says QuickGELU."""
    _file(directory, _image(image_module().state_dict()) | adaptor_state(16), "open_clip_model.safetensors")
    return _config(directory, OPENAI)


def proclip(directory: Path) -> Path:
    """ProCLIP: one block that is eight times as wide inside; the config states the width of the language model."""
    state = _image(image_module().state_dict()) | adaptor_state(16, blocks=1, times=8)
    _file(directory, state, "open_clip_model.safetensors")
    return _config(directory, {**OPENAI, "text_cfg": {"use_embedding": True, "llm_embedding_dim": WIDTH}})


def _config(directory: Path, config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Path:
    whole = {"model_cfg": {"embed_dim": 16, **config}, "preprocess_cfg": preprocess or {}}
    (directory / "open_clip_config.json").write_text(json.dumps(whole))
    return directory


def llm2clip_state(**options: Any) -> dict[str, Tensor]:
    """The tensors of `llm2clip`, another adaptor with ``options``."""
    return _image(image_module().state_dict()) | adaptor_state(16, **options)


EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 16}


def eva_module() -> Any:
    from timm.models.eva import eva02_base_patch16_clip_224

    torch.manual_seed(0)
    module = eva02_base_patch16_clip_224(False, **{**EVA, "ref_feat_shape": (16, 16)})
    trunks.drawn(module)
    return module.eval()


_EVA_NAMES = {
    "q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "attn.norm": "attn.inner_attn_ln", "mlp.norm": "mlp.ffn_ln",
    "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3",
}  # fmt: skip


def _eva_state() -> dict[str, Tensor]:
    state = {"logit_scale": torch.tensor(4.0), "visual.rope.freqs_cos": torch.zeros(16, 32)}
    for name, tensor in eva_module().state_dict().items():
        theirs = name
        for ours, replaced in _EVA_NAMES.items():
            theirs = theirs.replace(ours, replaced)
        state[f"visual.{theirs}"] = tensor
    return state


def llm2clip_eva(directory: Path) -> Path:
    """EVA02 in the names of its authors, in one file."""
    return _file(directory, _eva_state() | adaptor_state(16), "llm2clip.safetensors")


def inside_state() -> dict[str, Tensor]:
    """An adaptor, and a tensor of the language model beside it."""
    return adaptor_state(16, start=INSIDE) | {"text.text.model.norm.weight": torch.ones(WIDTH)}


def llm2clip_eva_inside(directory: Path) -> Path:
    return _file(directory, _eva_state() | inside_state(), "llm2clip.safetensors")


def llm2clip_inside(directory: Path) -> Path:
    _file(directory, _image(image_module().state_dict()) | inside_state(), "open_clip_model.safetensors")
    return _config(directory, OPENAI)


def _of_open_clip(source: Path, embed: int) -> Path:
    """The checkpoint at ``source`` with an adaptor in place of its text tower."""
    file = source / "open_clip_model.safetensors"
    _file(source, _image(load_file(file)) | adaptor_state(embed), file.name)
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"] = {**config["model_cfg"], "text_cfg": {"use_embedding": True}}
    (source / "open_clip_config.json").write_text(json.dumps(config))
    return source


def llm2clip_timm(directory: Path) -> Path:
    """EVA02 as open_clip has it."""
    return _of_open_clip(trunks.eva02(directory), 64)


def llm2clip_siglip(directory: Path) -> Path:
    return _of_open_clip(siglip.open_clip_siglip(directory), 32)


def open_clip_image(checkpoint: Path) -> Any:
    """The image tower of a directory, as open_clip's adapter of timm builds it."""
    from open_clip.timm_model import TimmModel

    config = json.loads((checkpoint / "open_clip_config.json").read_text())["model_cfg"]
    vision = config["vision_cfg"]
    options = {"pool": vision["timm_pool"], "proj": vision["timm_proj"]}
    module = TimmModel(vision["timm_model_name"], config["embed_dim"], vision["image_size"], **options)
    state = load_file(checkpoint / "open_clip_model.safetensors")
    module.load_state_dict({n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")})
    return module.eval()
