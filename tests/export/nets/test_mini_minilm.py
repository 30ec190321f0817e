import numpy as np
import pytest
import torch

from calmclip.export.nets.mini import facts, minilm, parameters
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.weights import MINILM, minilm_state


def test_equals_transformers_on_padded_and_full_rows():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(MINILM.locate().parent, attn_implementation="eager").eval()
    ours = minilm.from_state(tensors(minilm_state()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, facts.VOCABULARY, (3, 19), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    mask[2, 1:] = 0
    with torch.inference_mode():
        states = theirs(ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None]
        expected = (states * weight).sum(1) / weight.sum(1)
        assert torch.allclose(ours(ids, mask), expected, atol=2e-6)
        assert torch.allclose(ours(ids[:1]), expected[:1], atol=2e-6)  # no mask: every id is a token
        assert torch.allclose(ours(ids[1:2, :11]), ours(ids, mask)[1:2], atol=1e-6)  # padding changes nothing


def test_a_key_of_another_model_is_an_error():
    state = tensors(minilm_state())
    state["encoder.layer.6.output.dense.bias"] = torch.zeros(384)
    with pytest.raises(ValueError, match=r"encoder\.layer\.6\.output\.dense\.bias"):
        minilm.from_state(state)


def test_numpy_gives_the_modules_parameters():
    module = minilm.from_state(tensors(minilm_state())).state_dict()
    arrays = parameters.minilm(minilm_state())
    assert arrays.keys() == module.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, module[name].numpy(), err_msg=name)
