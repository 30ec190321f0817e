"""The text side of LLM2CLIP and ProCLIP, for any image tower: names of the adaptor, and the vectors that it reads.

Source: Huang et al. 2024, LLM2CLIP (arXiv 2411.04997) and its published code, which makes precomputed vectors unit
vectors first, and those of a language model inside not. A checkpoint that was trained with the language model inside
keeps the adaptor under ``text.text_proj`` and the language model under ``text.text``, which is not read here: the
adapter `text_encoder` takes it from a directory of its own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import DROP, Rule, rename
from calmclip.export.towers import part
from calmclip.export.towers.adaptor import TextAdaptor, depth
from calmclip.models.bundle.manifest import VectorPreprocess
from calmclip.models.errors import UnknownCheckpoint

OUTSIDE, INSIDE = "text.text_adaptor", "text.text_proj.text_adaptor"  # prefixes, by the place of the language model
_NAMES = {"fn.0.{p}": "up.{p}", "fn.3.{p}": "down.{p}", "ln.{p}": "norm.{p}", "{p}": "{p}"}
REQUIRED = ("text.layers.0.norm.weight", "text.layers.0.up.weight", "logit_scale")
WIDTH = "llm_embedding_dim"  # ProCLIP's text_cfg


def rules(prefix: str) -> tuple[Rule, ...]:
    """``prefix``: `OUTSIDE` or `INSIDE`."""
    inside = (Rule("text.text.{rest}", DROP),) if prefix == INSIDE else ()
    return (*rename(f"{prefix}.{{i}}", "text.layers.{i}", _NAMES), *inside)


def has_adaptor(prefix: str, checkpoint: Checkpoint) -> bool:
    return any(name.startswith(f"{prefix}.") for name in checkpoint.names)


def text_parts(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of `Settings` for texts. ``config``: open_clip's, if there is one.

    Raises `UnknownCheckpoint` for a config whose numbers are not those of the weights.
    """
    width, last = len(state["text.layers.0.norm.weight"]), depth(part(state, "text.")) + 1
    embed = state.get(f"text.layers.{last}.weight")
    expected = {} if config is None else {"embed_dim": config.get("embed_dim"), WIDTH: config["text_cfg"].get(WIDTH)}
    for name, number in {"embed_dim": None if embed is None else len(embed), WIDTH: width}.items():
        if expected.get(name) is not None and number is not None and expected[name] != number:
            raise UnknownCheckpoint(
                f"{checkpoint.path}: its config says {name} {expected[name]}; the weights of the adaptor make it "
                f"{number}"
            )
    return {
        "text": TextAdaptor,
        "tokens": VectorPreprocess(dim=width, model=checkpoint.facts.text_model or ""),
        "templates": (),
    }
