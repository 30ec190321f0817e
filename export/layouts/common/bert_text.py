"""Text towers of BERT's kind: names, facts that the shapes do not say, tokenizers.

Source: Devlin et al. 2018 (arXiv 1810.04805), in the names of transformers' `BertModel` and `RobertaModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint, hugging_face
from calmclip.export.checkpoints.files import require_package
from calmclip.export.checkpoints.locate import one_line
from calmclip.export.layouts import DROP, Rule, concatenate, rename
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.bert import BertText
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

HEAD_WIDTH = 64
_CLASSES = {  # file of a vocabulary -> the class of transformers that reads it if no config beside it names one
    "tokenizer.json": "PreTrainedTokenizerFast",
    "vocab.txt": "BertTokenizer",
    "sentencepiece.bpe.model": "XLMRobertaTokenizer",
    "vocab.json": "RobertaTokenizer",
}


@dataclass(frozen=True)
class Kind:
    """Facts of an architecture that no tensor tells. The first token's position is ``offset``."""

    pad_id: int
    offset: int
    eps: float


BERT, ROBERTA = Kind(pad_id=0, offset=0, eps=1e-12), Kind(pad_id=1, offset=2, eps=1e-5)
KINDS = {"bert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA}


_BLOCK = {
    "attention.output.dense.{p}": "attn.out.{p}",
    "attention.output.LayerNorm.{p}": "norm1.{p}",
    "intermediate.dense.{p}": "mlp.up.{p}",
    "output.dense.{p}": "mlp.down.{p}",
    "output.LayerNorm.{p}": "norm2.{p}",
}


def rules(theirs: str, layers: str = "encoder.layer") -> tuple[Rule, ...]:
    """The names after the prefix ``theirs``."""
    block = f"{theirs}{layers}.{{i}}"
    embeddings = {
        "word_embeddings.weight": "tokens.weight",
        "position_embeddings.weight": "positions",
        "token_type_embeddings.weight": "types",
        "LayerNorm.{p}": "norm_pre.{p}",
    }
    return (
        *rename(f"{theirs}embeddings", "text", embeddings),
        Rule(f"{theirs}embeddings.position_ids", DROP),
        Rule(f"{theirs}embeddings.token_type_ids", DROP),
        *rename(block, "text.blocks.{i}", _BLOCK),
        *concatenate(f"{block}.attention.self.*.{{p}}", "text.blocks.{i}.attn.qkv.{p}", ("query", "key", "value")),
        Rule(f"{theirs}pooler.dense.{{p}}", "text.pooler.{p}"),
    )


REQUIRED = ("text.tokens.weight", "text.positions", "text.types", "text.norm_pre.weight")


def tower(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    kind: Kind,
    context: int,
    module: type[BertText] = BertText,
    **options: Any,
) -> tuple[partial[BertText], TextPreprocess]:
    """``config``: the text tower's config of transformers, or {}; by default heads are 64 wide.

    ``options``: ``pool`` first, mean or none, ``pooler``, and ``clean`` of the texts. Raises `UnknownCheckpoint` with
    the setting that is not supported.
    """
    if (kind_of_positions := config.get("position_embedding_type", "absolute")) != "absolute":
        raise UnknownCheckpoint(
            f"the text tower's position_embedding_type is {kind_of_positions!r}; only 'absolute' is supported"
        )
    config = {name: value for name, value in config.items() if value is not None}
    pad, clean = config.get("pad_token_id", kind.pad_id), options.pop("clean", None)
    offset = pad + 1 if kind.offset else 0
    style = Style(
        heads=config.get("num_attention_heads", state["text.tokens.weight"].shape[1] // HEAD_WIDTH),
        activation=hugging_face.activation({"hidden_act": "gelu", **config}),  # type: ignore[arg-type]
        eps=config.get("layer_norm_eps", kind.eps),
        pool=options.pop("pool", "first"),
        attention=AttentionSpec.of(config),
    )
    context = min(context, len(state["text.positions"]) - offset)
    return (
        partial(module, style=style, context=context, offset=offset, **options),
        TextPreprocess(context=context, pad="longest", pad_id=pad, mask="mask", clean=clean),
    )


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in the checkpoint's directory, from the first of the usual files.

    Raises `UnknownCheckpoint` that says which file to add, or that transformers cannot read the file.
    """
    folder = checkpoint.directory
    file = next((name for name in _CLASSES if (folder / name).is_file()), None)
    if file is None:
        raise UnknownCheckpoint(
            f"{folder} has no tokenizer; put the tokenizer.json of the text tower there, or its vocab.txt (BERT) or "
            "sentencepiece.bpe.model (XLM-R)"
        )
    transformers = require_package("transformers", f"the tokenizer in {file}")
    transformers.logging.set_verbosity_error()
    try:
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        else:
            tokenizer = getattr(transformers, _CLASSES[file]).from_pretrained(folder, local_files_only=True)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the parts of transformers raise any kind
        raise UnknownCheckpoint(f"{folder / file} is no tokenizer that transformers reads: {one_line(error)}") from None


def text_settings(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    kind: Kind,
    context: int,
    **options: Any,
) -> dict[str, Any]:
    """The fields of `Settings` for texts: `tower`, with the tokenizer of the checkpoint's directory."""
    text, tokens = tower(config, state, kind, context, **options)
    return {"text": text, "tokens": tokens, "tokenizer": read_tokenizer(checkpoint).to_str().encode()}
