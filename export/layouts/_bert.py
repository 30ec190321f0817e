"""What layouts with a text tower of BERT's kind have in common: names, what shapes do not say, tokenizers.

Source: Devlin et al. 2018 (arXiv 1810.04805), in the names of transformers' `BertModel` and `RobertaModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import require_package
from calmclip.export.checkpoints.weights import one_line
from calmclip.export.layouts import DROP, Rule, _hugging_face
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.bert import BertText
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

HEAD_WIDTH = 64
_CLASSES = {  # a vocabulary's file -> what of transformers reads it, where no config beside it says so
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


def rules(theirs: str, layers: str = "encoder.layer") -> tuple[Rule, ...]:
    """Names behind the prefix ``theirs``."""
    block = f"{theirs}{layers}.{{i}}"
    names = {
        "attention.output.dense.{p}": "attn.out.{p}",
        "attention.output.LayerNorm.{p}": "norm1.{p}",
        "intermediate.dense.{p}": "mlp.up.{p}",
        "output.dense.{p}": "mlp.down.{p}",
        "output.LayerNorm.{p}": "norm2.{p}",
    }
    return (
        Rule(f"{theirs}embeddings.word_embeddings.weight", "text.tokens.weight"),
        Rule(f"{theirs}embeddings.position_embeddings.weight", "text.positions"),
        Rule(f"{theirs}embeddings.token_type_embeddings.weight", "text.types"),
        Rule(f"{theirs}embeddings.LayerNorm.{{p}}", "text.norm_pre.{p}"),
        Rule(f"{theirs}embeddings.position_ids", DROP),
        Rule(f"{theirs}embeddings.token_type_ids", DROP),
        *(Rule(f"{block}.{one}", f"text.blocks.{{i}}.{other}") for one, other in names.items()),
        *(
            Rule(f"{block}.attention.self.{name}.{{p}}", "text.blocks.{i}.attn.qkv.{p}", piece=piece)
            for piece, name in enumerate(("query", "key", "value"))
        ),
        Rule(f"{theirs}pooler.dense.{{p}}", "text.pooler.{p}"),
    )


NEEDS = ("text.tokens.weight", "text.positions", "text.types", "text.norm_pre.weight")


def tower(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    kind: Kind,
    context: int,
    made: type[BertText] = BertText,
    **more: Any,
) -> tuple[partial[BertText], TextPreprocess]:
    """``config``: transformers' of the text tower, as far as there is one; heads are 64 wide where it does not say.

    ``more``: ``pool`` first, mean or none, ``pooler``, and ``clean`` of the texts. Raises `UnknownCheckpoint` naming a
    setting we do not have.
    """
    if (how := config.get("position_embedding_type", "absolute")) != "absolute":
        raise UnknownCheckpoint(f"the text tower's position_embedding_type is {how!r}; only 'absolute' is supported")
    config = {name: value for name, value in config.items() if value is not None}
    pad, clean = config.get("pad_token_id", kind.pad_id), more.pop("clean", None)
    offset = pad + 1 if kind.offset else 0
    style = Style(
        heads=config.get("num_attention_heads", state["text.tokens.weight"].shape[1] // HEAD_WIDTH),
        activation=_hugging_face.activation({"hidden_act": "gelu", **config}),  # type: ignore[arg-type]
        eps=config.get("layer_norm_eps", kind.eps),
        pool=more.pop("pool", "first"),
        attention=AttentionSpec.of(config),
    )
    context = min(context, len(state["text.positions"]) - offset)
    return (
        partial(made, style=style, context=context, offset=offset, **more),
        TextPreprocess(context=context, pad="longest", pad_id=pad, mask="mask", clean=clean),
    )


def tokenizer(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer in the checkpoint's directory, whichever of its usual files is there.

    Raises `UnknownCheckpoint` that says which file to put there, or that its tokens are not those of the weights.
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
    told = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    made = transformers.AutoTokenizer if told else getattr(transformers, _CLASSES[file])
    try:
        found = made.from_pretrained(folder, local_files_only=True, **({"trust_remote_code": False} if told else {}))
        backend = Tokenizer.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # whatever its parts raise
        raise UnknownCheckpoint(f"{folder / file} is no tokenizer that transformers reads: {one_line(error)}") from None
    return backend
