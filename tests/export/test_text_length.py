"""Padding after a text does not change the answer, so texts of similar length may be padded to one width and batched.

A causal tower pools at the end of the text, before all padding; a masked tower ignores padding. A matrix product of
another height may be summed in another order: a difference of 1e-6 at most.
"""

from itertools import permutations

import numpy as np
import pytest
import torch
import transformers

from calmclip.export.nets import NETS, Tower
from calmclip.export.parity import onnx_run
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Tensor, TextPreprocess
from calmclip.models.bundle.store import read
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.runner import Runner, open_bundle
from tests import tiny

TEXTS = ["red", "a red cat", "a photo of a dog.", "a photo of two green dogs."]  # 3 to 10 tokens
IDS = Tensor(dtype="int64", shape=("B", "T"))


class Masked(torch.nn.Module):
    """transformers' BERT, its last state averaged over what the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=600, max_position_embeddings=40, **sizes)
        config._attn_implementation = "eager"
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        tiny.spread(self.bert)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        state = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.to(state.dtype)[..., None]
        return torch.nn.functional.normalize((state * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.fixture(scope="module")
def causal(tiny_hf_clip):
    return NETS.get("clip").load(str(tiny_hf_clip)).towers["text"]


@pytest.fixture(scope="module")
def masked():
    spec = TextPreprocess(context=40, mask="mask", pad_id=7)
    outputs = {"text_embeds": Tensor(dtype="float32", shape=("B", 32))}
    return Tower(Masked(), {"ids": IDS, "mask": IDS}, outputs, spec, quantizer="smooth")


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("multiple", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_padding_behind_a_text_changes_no_answer(kind: str, multiple: int, request, tmp_path):
    tower = request.getfixturevalue(kind)
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    run = onnx_run(to_onnx(tower))
    plain = TextPreparer(tower.preprocess.model_copy(update={"multiple": 1}), tmp_path)
    padded = TextPreparer(tower.preprocess.model_copy(update={"multiple": multiple}), tmp_path)
    alone = np.concatenate([run(plain.prepare([text]))["text_embeds"] for text in TEXTS])
    feeds = [padded.prepare([text]) for text in TEXTS]
    assert {feed["ids"].shape[1] % multiple for feed in feeds} == {0}
    together = np.concatenate([run(feed)["text_embeds"] for feed in feeds])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(run(padded.prepare(TEXTS))["text_embeds"], alone, atol=1e-6)
    whole = {name: torch.from_numpy(array) for name, array in padded.prepare(TEXTS).items()}
    with torch.inference_mode():
        np.testing.assert_allclose(tower.module(*whole.values()).numpy(), alone, atol=1e-5)


@pytest.mark.parametrize("net", ["hf", "owl", "mini"])
def test_nets_make_texts_up_to_a_multiple_of_four_and_no_longer_than_their_context(net: str, request):
    checkpoint = (
        "mini" if net == "mini" else str(request.getfixturevalue("tiny_hf_clip" if net == "hf" else "tiny_owl"))
    )
    spec = NETS.get({"hf": "clip"}.get(net, net)).load(checkpoint).towers["text"].preprocess
    assert [spec.width(tokens) for tokens in (1, 4, 5, spec.context - 1, spec.context)] == [
        4,
        4,
        8,
        *[spec.context] * 2,
    ]


def test_texts_of_a_fixed_width_stay_as_they_are(tmp_path):
    spec = NETS.get("clip").load(str(tiny.open_clip_custom_text(tmp_path / "oc"))).towers["text"].preprocess
    assert (spec.pad, spec.multiple, spec.width(3)) == ("context", 1, 77)


def test_an_int8_bundle_answers_the_same_whatever_its_texts_are_padded_to(tiny_bundles):
    """Static ranges: a row does not depend on other rows or on its padding."""
    sealed = read(tiny_bundles / "tiny-int8")
    graphs = dict(sealed.manifest.graphs)
    embeds = []
    for multiple in (1, 8):
        spec = graphs["text"].preprocess.model_copy(update={"multiple": multiple})
        graph = graphs["text"].model_copy(update={"preprocess": spec})
        manifest = sealed.manifest.model_copy(update={"graphs": graphs | {"text": graph}})
        runner = Runner(Bundle(sealed._replace(manifest=manifest)))
        embeds.append(np.concatenate([runner.embed(texts=[text]) for text in TEXTS]))
    np.testing.assert_allclose(*embeds, atol=1e-6)


def test_a_text_has_the_same_bits_alone_and_in_slices(tiny_bundles, library):
    """Also padded to the width of a longer text. Without the op library some steps are in float, and the last bit of a
    sum may differ, as in a float bundle."""
    words = ("red", "a cat", "dog", "two green dogs")
    many = [" ".join(chosen) for count in range(1, 5) for chosen in permutations(words, count)]
    for kind in ("int8", "float"):
        runner = open_bundle(tiny_bundles / f"tiny-{kind}", cached_rows=0)
        together = runner.embed(texts=many)
        alone = np.concatenate([runner.embed(texts=[text]) for text in many])
        feeds = dict(runner.bundle.text().prepare(many))  # all as wide as the longest
        padded = runner.session("text").run(feeds)["text_embeds"]
        assert len(np.unique(alone, axis=0)) == len(many)
        if kind == "int8":
            assert together.tobytes() == alone.tobytes() == padded.tobytes()
        else:
            np.testing.assert_allclose(together, alone, atol=1e-6)


def test_without_its_mask_a_masked_tower_would_answer_otherwise(masked):
    """The tests above would pass without a mask if padding had no effect; it has one."""
    run = onnx_run(to_onnx(masked))
    ids, ones = np.array([[1, 2, 3, 7, 7]]), np.ones((1, 5), np.int64)
    kept = np.array([[1, 1, 1, 0, 0]])
    unmasked, other = (run({"ids": ids, "mask": mask})["text_embeds"] for mask in (ones, kept))
    assert np.abs(unmasked - other).max() > 1e-3
