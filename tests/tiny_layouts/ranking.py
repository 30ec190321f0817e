"""The ranking adapter by its definition, over timm's ConvNeXt and open_clip's text tower, in its authors' names.

Source: Yu et al. 2024 (arXiv 2412.06760). The oracle of `calmclip.export.nets.ranking`; its layers are torch's own.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import spread
from tests.tiny_layouts.trunks import drawn

SIDE, DIM, WORDS, QUERIES = 64, 64, 4, 3
TEXT = {"context_length": 77, "vocab_size": 49408, "width": DIM, "heads": 2, "layers": 2, "output_tokens": True}
CONFIG = {
    "embed_dim": DIM,
    "vision_cfg": {"timm_model_name": "convnext_large", "timm_pool": "", "timm_proj": "", "image_size": SIDE},
    "text_cfg": TEXT,
    "adapter_cfg": {"num_layers": 2, "d_model": DIM, "n_head": 4, "num_learnable_text_tokens": WORDS},
    "misc_cfg": {"model_version": "clip-adapter-v2"},
}


class Block(nn.Module):
    """Pre-norm; with a norm for the other modality it is a cross-attention."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, 8)
        if across:
            self.ln_1_kv = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential()
        self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj = nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        keys = self.ln_1(x) if other is None else self.ln_1_kv(other)
        queries, keys = (t.transpose(0, 1) for t in (self.ln_1(x), keys))
        x = x + self.attn(queries, keys, keys)[0].transpose(0, 1)
        answer: Tensor = x + self.mlp(self.ln_2(x))
        return answer


def regressor(*before: nn.Module, products: int) -> Any:
    hidden = [layer for _ in range(products) for layer in (nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.ReLU())]
    module: Any = nn.Module()
    module.pre_linear_block, module.output_head = nn.Sequential(*before, *hidden), nn.Linear(DIM, 1)
    return module


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.learnable_text_tokens = nn.Parameter(torch.randn(1, WORDS))
        self.crossmodal_block: Any = nn.Module()
        self.crossmodal_block.resblocks = nn.ModuleList(Block(False) for _ in range(2))
        self.crossmodal_block.cross_attn = nn.ModuleList(Block(True) for _ in range(2))
        self.crossmodal_block.ln_final = nn.LayerNorm(DIM)
        self.crossmodal_block.projection = nn.Parameter(torch.randn(DIM, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, dim_feedforward=DIM, batch_first=True)
        self.post_fuse_block = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.reg_ln, self.regressor = nn.LayerNorm(DIM), regressor(products=2)
        self.reg_tokens = nn.Parameter(torch.randn(QUERIES, DIM))
        self.reg_token_pooler: Any = nn.Module()
        for name in ("q_proj", "kv_proj", "out_proj"):
            setattr(self.reg_token_pooler, name, nn.Linear(DIM, DIM))
        self.reg_token_pooler.ln_q, self.reg_token_pooler.ln_kv = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.pair_regressor = regressor(nn.LayerNorm(DIM), products=3)
        drawn(self)
        self.eval()

    def read(self, image: Tensor, text: Tensor) -> Tensor:
        learned = self.learnable_text_tokens.reshape(1, WORDS, 1).expand(1, WORDS, DIM)
        text = torch.cat((learned, text), dim=1).expand(len(image), -1, -1)
        for among, across in zip(self.crossmodal_block.resblocks, self.crossmodal_block.cross_attn, strict=True):
            image = across(among(image), text)
        x: Tensor = self.post_fuse_block(self.crossmodal_block.ln_final(image) @ self.crossmodal_block.projection)
        return x

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.reg_ln(self.read(image, text)).sum(dim=1)
        score: Tensor = self.regressor.output_head(self.regressor.pre_linear_block(x))[:, 0]
        return score

    def pair(self, first: Tensor, second: Tensor, text: Tensor) -> Tensor:
        pooler = self.reg_token_pooler
        tokens = [pooler.ln_kv(pooler.kv_proj(self.read(image, text))) for image in (first, second)]
        half = tokens[0].shape[1]
        q, kv = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in (
            pooler.ln_q(pooler.q_proj(self.reg_tokens))[None], torch.cat(tokens, dim=1)))  # fmt: skip
        weights = (q @ kv.mT * (DIM // 8) ** -0.5).softmax(dim=-1)
        values = weights[..., :half] @ kv[..., :half, :] - weights[..., half:] @ kv[..., half:, :]
        x = pooler.out_proj(values.transpose(1, 2).flatten(2)).sum(dim=1)
        score: Tensor = self.pair_regressor.output_head(self.pair_regressor.pre_linear_block(x))[:, 0]
        return score


class Model(nn.Module):
    """The three parts; ``visual.trunk`` is timm's, the text tower open_clip's."""

    def __init__(self) -> None:
        super().__init__()
        import open_clip
        from timm.models.convnext import ConvNeXt

        torch.manual_seed(0)
        self.visual: Any = nn.Module()
        # four stages of 1 / 4 to 1 / 32: a map of 2 x 2 positions
        self.visual.trunk = ConvNeXt(
            depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=DIM, global_pool="", ls_init_value=0.3
        )
        drawn(self.visual)
        text = {name: value for name, value in TEXT.items() if name != "output_tokens"}
        self.text: Any = open_clip.model._build_text_tower(DIM, text)
        spread(self.text)
        self.adapter = Adapter()
        self.eval()

    def image_tokens(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.visual.trunk(pixels).flatten(2).mT
        return tokens

    def text_tokens(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        x = self.text.token_embedding(ids) + self.text.positional_embedding
        tokens: Tensor = self.text.ln_final(self.text.transformer(x, attn_mask=mask))
        return tokens

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        scores: Tensor = self.adapter(self.image_tokens(pixels), self.text_tokens(ids))
        return scores

    def state(self) -> dict[str, Tensor]:
        state = {name.removeprefix("text."): tensor for name, tensor in self.state_dict().items()}
        return {**{n: t for n, t in state.items() if n != "attn_mask"}, "logit_scale": torch.tensor(2.0)}


def ranking(directory: Path) -> Path:
    """As the authors publish it: weights, and model-config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in Model().state().items()}
    save_file(state, directory / "ranking.safetensors", metadata={"format": "pt"})
    (directory / "model-config.json").write_text(json.dumps(CONFIG))
    return directory
