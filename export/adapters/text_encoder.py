"""The language model before the adaptor of LLM2CLIP and ProCLIP, so that the bundle reads texts in place of vectors.

Source: Huang et al. 2024, LLM2CLIP (arXiv 2411.04997), on LLM2Vec (BehnamGhader et al. 2024, arXiv 2404.05961): every
token sees all others, the vector is the mean of the tokens that are no instruction, and at most 512 tokens are read.
Unlike precomputed vectors, those of a model inside are not made unit vectors before the adaptor.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.checkpoints import Weights, hub
from calmclip.export.nets import NETS, Net, attention_promises, text_inputs
from calmclip.export.nets.common.sentence_modules import FILE
from calmclip.export.towers.adaptor import AdaptedText, TextAdaptor
from calmclip.export.towers.decoder import DecoderText
from calmclip.models.bundle.manifest import DefaultClassifier, FrozenModel, TextPreprocess, VectorPreprocess
from calmclip.models.errors import BadRequest

TEMPLATES = ("a photo of a {}.",)


class Params(FrozenModel):
    checkpoint: Path = Field(description="the language model whose vectors an adaptor reads: the bundle reads texts")
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    tokens: int = Field(default=512, ge=2, description="the longest text that the language model reads")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net without an adaptor over vectors, or of vectors with another number of numbers; and
    as the net `decoder`."""
    tower = net.towers.get("text")
    if tower is None or not isinstance(tower.preprocess, VectorPreprocess) or net.folded:
        raise BadRequest(
            f"text_encoder does not apply to {net.source.model}: its text side reads no vectors of a language model; "
            "leave out --text-encoder"
        )
    path, plugin = params.checkpoint, NETS.get("decoder")
    if not plugin.recognise(str(path)) or plugin.unfolded is None:
        raise BadRequest(f"--text-encoder {path} is no directory of a decoder; 'calmclip plugins' lists the nets")
    pool: Literal["mean"] | None = None if (path / FILE).is_file() else "mean"
    decoder = plugin.unfolded(str(path), Weights(pool=pool, attention=params.attention))
    encoder = decoder.towers["text"]
    made, read = encoder.outputs["text_embeds"].shape[1], tower.preprocess.dim
    if made != read:
        raise BadRequest(
            f"the language model {hub.name(path)} makes vectors of {made} numbers; the adaptor of {net.source.model} "
            f"reads {read}. It belongs to another language model"
        )
    assert isinstance(encoder.preprocess, TextPreprocess)
    assert isinstance(encoder.module, DecoderText)
    assert isinstance(tower.module, TextAdaptor)
    tokens = encoder.preprocess.model_copy(update={"context": min(encoder.preprocess.context, params.tokens)})
    module = AdaptedText(encoder.module, tower.module)
    text = replace(
        encoder,
        module=module,
        inputs=text_inputs(tokens),
        outputs=tower.outputs,
        preprocess=tokens,
        promises={**encoder.promises, **attention_promises(module)},
        prefix=tower.prefix,
    )
    classifier = (net.classifier or DefaultClassifier()).model_copy(update={"templates": TEMPLATES})
    adapted = replace(
        net, towers={**net.towers, "text": text}, files={**net.files, **decoder.files}, classifier=classifier
    )
    note = f"language model {hub.name(path)} inside, {params.attention} attention, pooling {encoder.module.style.pool}"
    return with_note(adapted, note, text_encoder=path)


ADAPTERS.register("text_encoder")(Adapter(Params, adapt, {"--text-encoder": "checkpoint"}))
