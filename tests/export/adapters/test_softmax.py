"""A softmax that a checkpoint was not trained with is refused, and what it would do is said."""

import re
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

ASKED = "clipped(-0.04:1.01)"


def measured(checkpoint: Path) -> float:
    """The mean cosine of logits, a token each, of the texts that ship, by transformers and the paper's definition; a
    text is padded to a multiple of 4 tokens, as a bundle is fed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = quantizable.change(transformers.BertForMaskedLM.from_pretrained(checkpoint), ASKED)
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
    asked = ["export", str(tiny_bert), "--softmax", ASKED, "--out", str(tmp_path)]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert f"{ASKED} instead of vanilla" in said
    assert float(re.search(r"mean cosine ([\d.]+)", said)[1]) == pytest.approx(want, abs=6e-5)
    assert f'"attn_softmax": "{ASKED}"' in said
    assert "--force" in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_forced_softmax_is_exported_and_noted(tiny_bert: Path, tmp_path: Path, capsys):
    asked = ["export", str(tiny_bert), "--softmax", ASKED, "--force", "--name", "forced", "--out", str(tmp_path)]
    assert main(asked) == 0
    assert f"softmax forced: {ASKED} instead of vanilla, mean cosine " in capsys.readouterr().out
    (bundle,) = tmp_path.iterdir()
    assert f"softmax forced: {ASKED} instead of vanilla" in read(bundle).manifest.source.notes


def loaded(checkpoint: Path, **params: object):  # type: ignore[no-untyped-def]
    return NETS.get("bert").unfolded(str(checkpoint)), softmax.Params(**params)  # type: ignore[arg-type, misc]


def feeds(net, tower):  # type: ignore[no-untyped-def]
    return [{"ids": np.array([[598, 3, 7, 599]]), "mask": np.ones((1, 4), np.int64)}]


def test_force_takes_it_and_the_source_says_so(tiny_bert: Path):
    net, params = loaded(tiny_bert, kind=ASKED, force=True)
    lines: list[str] = []
    made = softmax.adapt(net, params, Context(feeds, say=lines.append))
    assert {one.softmax for one in softmax.attention(made.towers["mlm"].module)} == {Softmax(-0.04, 1.01)}
    (line,) = lines
    assert line in made.source.notes


def test_the_softmax_that_it_has_already_is_no_other(tiny_bert: Path, tmp_path: Path):
    net, params = loaded(tiny_bert, kind="vanilla")
    assert softmax.adapt(net, params, Context(feeds)) is net
    trained = changed(tiny_bert, tmp_path / "trained", attn_softmax=ASKED)
    net, params = loaded(trained, kind=ASKED)
    assert softmax.adapt(net, params, Context(feeds)) is net
    net, params = loaded(trained, kind="vanilla")
    with pytest.raises(BadRequest, match=r"vanilla instead of clipped\(-0\.04:1\.01\)"):
        softmax.adapt(net, params, Context(feeds))
    assert {one.softmax for one in softmax.attention(net.towers["mlm"].module)} == {Softmax(-0.04, 1.01)}


def test_a_tower_that_runs_only_once_it_is_folded_is_measured_too(tmp_path: Path):
    """SigLIP's pooling."""
    asked = Adapt(name="softmax", params={"kind": ASKED, "force": True})
    net = load("clip", str(siglip.hf_siglip(tmp_path)), Weights(), [asked])
    assert 0.9 < float(net.source.notes.split("mean cosine ")[1].split()[0]) < 0.9999


def test_force_completes_what_a_recipe_asks_for():
    (made,) = flags.asked(
        [Adapt(name="softmax", params={"kind": ASKED})], [flags.Typed("softmax", {"force": True}, False)]
    )
    assert made.params == {"kind": ASKED, "force": True}


def test_a_net_without_attention_of_ours_refuses_it(tmp_path: Path, capsys):
    assert main(["export", "mini", "--softmax", ASKED, "--out", str(tmp_path)]) == 2
    assert "none of its attention is ours to set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--softmax", "clip"], "softmax is 'clip'; expected vanilla, or clipped(gamma:zeta)"),
        (["--force"], "adapter softmax: kind (--softmax): Field required"),
        (["--stretch", "80"], "no text tower with a table of positions"),
    ],
)
def test_what_is_asked_wrongly(flags: list[str], named: str, tiny_bert: Path, tmp_path: Path, capsys):
    assert main(["export", str(tiny_bert), *flags, "--out", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err
