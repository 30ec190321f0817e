"""A softmax that differs from that of the training is refused; the error gives the loss."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from calmclip.export import flags
from calmclip.export.adapters import Adapt, Context, softmax
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import NETS
from calmclip.export.pipeline import load
from calmclip.export.samples import texts
from calmclip.export.towers.attention import Softmax
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from tests import quantizable
from tests.tiny import changed
from tests.tiny_layouts import siglip

CLIPPED = "clipped(-0.04:1.01)"


def measured(checkpoint: Path) -> float:
    """The mean cosine of each token's logits over the texts that ship, by transformers and the paper's definition. A
    text is padded to a multiple of 4 tokens, as for a bundle."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = quantizable.change(transformers.BertForMaskedLM.from_pretrained(checkpoint), CLIPPED)
    cosines: list[float] = []
    for text in texts():
        row = tokenizer(text)["input_ids"]
        if len(row) > 40:
            continue
        padded = 4 * -(-len(row) // 4)
        ids = torch.tensor([row + [0] * (padded - len(row))])
        mask = (torch.arange(padded) < len(row)).long()[None]
        with torch.no_grad():
            sides = []
            for plain in (True, False):
                with quantizable.defined(plain):
                    sides.append(model(ids, attention_mask=mask).logits[0].double())
        cosines += torch.nn.functional.cosine_similarity(*sides, dim=-1).tolist()
    return float(np.mean(cosines))


def test_a_vanilla_bert_is_not_exported_with_a_clipped_softmax(tiny_bert: Path, tmp_path: Path, capsys):
    want = measured(tiny_bert)
    assert want < 0.9999, "the softmax must make a difference"
    command = ["export", str(tiny_bert), "--softmax", CLIPPED, "--out", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{CLIPPED} instead of vanilla" in error
    assert float(re.search(r"mean cosine ([\d.]+)", error)[1]) == pytest.approx(want, abs=6e-5)
    assert f'"attn_softmax": "{CLIPPED}"' in error
    assert "--force" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_forced_softmax_is_exported_and_noted(tiny_bert: Path, tmp_path: Path, capsys):
    command = ["export", str(tiny_bert), "--softmax", CLIPPED, "--force", "--name", "forced", "--out", str(tmp_path)]
    assert main(command) == 0
    assert f"softmax forced: {CLIPPED} instead of vanilla, mean cosine " in capsys.readouterr().out
    (bundle,) = tmp_path.iterdir()
    assert f"softmax forced: {CLIPPED} instead of vanilla" in read(bundle).manifest.source.notes


def loaded(checkpoint: Path, **params: object):  # type: ignore[no-untyped-def]
    return NETS.get("bert").unfolded(str(checkpoint)), softmax.Params(**params)  # type: ignore[arg-type, misc]


def feeds(net, tower):  # type: ignore[no-untyped-def]
    return [{"ids": np.array([[598, 3, 7, 599]]), "mask": np.ones((1, 4), np.int64)}]


def test_force_accepts_it_and_the_source_notes_it(tiny_bert: Path):
    net, params = loaded(tiny_bert, kind=CLIPPED, force=True)
    lines: list[str] = []
    adapted = softmax.adapt(net, params, Context(feeds, say=lines.append))
    assert {layer.softmax for layer in softmax.attention_layers(adapted.towers["mlm"].module)} == {Softmax(-0.04, 1.01)}
    (line,) = lines
    assert line in adapted.source.notes


def test_the_softmax_of_the_checkpoint_changes_nothing(tiny_bert: Path, tmp_path: Path):
    net, params = loaded(tiny_bert, kind="vanilla")
    assert softmax.adapt(net, params, Context(feeds)) is net
    trained = changed(tiny_bert, tmp_path / "trained", attn_softmax=CLIPPED)
    net, params = loaded(trained, kind=CLIPPED)
    assert softmax.adapt(net, params, Context(feeds)) is net
    net, params = loaded(trained, kind="vanilla")
    with pytest.raises(BadRequest, match=r"vanilla instead of clipped\(-0\.04:1\.01\)"):
        softmax.adapt(net, params, Context(feeds))
    assert {layer.softmax for layer in softmax.attention_layers(net.towers["mlm"].module)} == {Softmax(-0.04, 1.01)}


def test_a_tower_that_runs_only_after_folding_is_measured(tmp_path: Path):
    """SigLIP's pooling is such a tower."""
    adapter = Adapt(name="softmax", params={"kind": CLIPPED, "force": True})
    net = load("clip", str(siglip.hf_siglip(tmp_path)), Weights(), [adapter])
    assert 0.8 < float(net.source.notes.split("mean cosine ")[1].split()[0]) < 0.9999


def test_force_on_the_command_line_completes_a_recipe():
    (adapter,) = flags.merged(
        [Adapt(name="softmax", params={"kind": CLIPPED})], [flags.Typed("softmax", {"force": True}, False)]
    )
    assert adapter.params == {"kind": CLIPPED, "force": True}


def test_a_net_without_our_attention_refuses_a_softmax(tiny_bert: Path):
    net = NETS.get("bert").load(str(tiny_bert))
    towers = {role: replace(tower, module=torch.nn.Identity()) for role, tower in net.towers.items()}
    with pytest.raises(BadRequest, match="it has no attention whose softmax can be set"):
        softmax.adapt(replace(net, towers=towers), softmax.Params(kind=CLIPPED), Context(lambda net, tower: []))


def test_a_net_that_ships_its_graphs_refuses_a_softmax(tmp_path: Path, capsys):
    assert main(["export", "mini", "--softmax", CLIPPED, "--out", str(tmp_path)]) == 2
    assert "it ships its graphs, without modules" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--softmax", "clip"], "softmax is 'clip'; expected vanilla, or clipped(gamma:zeta)"),
        (["--force"], "adapter softmax: kind (--softmax): Field required"),
        (["--stretch", "80"], "no text tower with a table of positions"),
    ],
)
def test_wrong_options_are_named(flags: list[str], message: str, tiny_bert: Path, tmp_path: Path, capsys):
    assert main(["export", str(tiny_bert), *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
