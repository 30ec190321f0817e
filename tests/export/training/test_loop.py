"""The loop on a small task. Oracles: torch's optimizer, and formulas in float64."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from calmclip.export.towers import Style
from calmclip.export.towers.transformer import Block
from calmclip.export.training.loop import LOG, STATE, outliers, train
from calmclip.export.training.settings import training
from calmclip.models.errors import BadRequest, ExportError
from tests import towers


class Line:
    """y = 3 x - 1, learned by one layer and a norm."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def batch(self, draw):
        x = draw.standard_normal((16, 4)).astype(np.float32)
        return torch.from_numpy(x), torch.from_numpy(3 * x[:, :1] - 1)

    def loss(self, batch):
        return nn.functional.mse_loss(self.module(batch[0]), batch[1])

    def measure(self):
        return {"error": float(self.loss(self.batch(np.random.default_rng(99))))}


def settings(tmp_path, **more):
    return training(
        objective="clm", text=tmp_path / "any.txt", **{"steps": 30, "every": 10, "warmup": 5, "rate": 0.01, **more}
    )


def test_it_learns_and_logs(tmp_path):
    line = train(Line(), settings(tmp_path, steps=300, every=100), tmp_path)
    rows = [json.loads(row) for row in (tmp_path / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200, 300]
    assert rows[-1] == line
    assert rows[-1]["error"] < 0.5 * rows[0]["error"]


def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path):
    whole, halves = Line(), Line()
    train(whole, settings(tmp_path), tmp_path / "whole")
    train(halves, settings(tmp_path), tmp_path / "halves", until=20)
    with (tmp_path / "halves" / LOG).open("a") as log:
        log.write('{"step": 30, "sec')  # an interrupted write
    again = Line()
    nn.init.zeros_(again.module[0].weight)  # the state replaces the start
    line = train(again, settings(tmp_path), tmp_path / "halves")
    for parameter, other in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(parameter, other)
    steps = [json.loads(row)["step"] for row in (tmp_path / "halves" / LOG).read_text().splitlines()]
    assert steps == [10, 20, 30]
    assert train(Line(), settings(tmp_path), tmp_path / "halves") == line  # nothing is left to do
    assert line["step"] == 30


def test_steps_are_those_of_torchs_adamw_with_decay_on_matrices_alone(tmp_path):
    ours, theirs = Line(), Line()
    given = settings(tmp_path, steps=4, every=4, warmup=2, decay=0.3, clip=1e9)
    train(ours, given, tmp_path / "out")
    named = dict(theirs.module.named_parameters())
    decayed = [named.pop(name) for name in ("0.weight", "2.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": [*named.values()], "weight_decay": 0.0}],
        betas=(0.9, 0.999), foreach=False,
    )  # fmt: skip
    for step, share in enumerate((0.5, 0.75, 0.5, 0.25)):  # risen in two steps, then down to 0 in four
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * share
        optimizer.zero_grad()
        theirs.loss(theirs.batch(np.random.default_rng((0, step)))).backward()
        optimizer.step()
    for parameter, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=1e-6)


def test_a_state_of_other_settings_is_refused(tmp_path):
    train(Line(), settings(tmp_path), tmp_path / "out", until=10)
    with pytest.raises(BadRequest, match="of a training with other settings"):
        train(Line(), settings(tmp_path, seed=1), tmp_path / "out")


def test_a_state_from_before_a_setting_existed_is_continued(tmp_path):
    out = tmp_path / "out"
    train(Line(), settings(tmp_path), out, until=10)
    state = torch.load(out / STATE)
    older = {name: value for name, value in json.loads(state["settings"]).items() if name != "penalty"}
    torch.save({**state, "settings": json.dumps(older)}, out / STATE)
    assert train(Line(), settings(tmp_path), out)["step"] == 30
    torch.save({**state, "settings": json.dumps({**older, "gone": 1})}, out / STATE)
    with pytest.raises(BadRequest, match="of a training with other settings"):
        train(Line(), settings(tmp_path), out)


def test_a_loss_that_is_no_number_stops_it(tmp_path):
    task = Line()
    task.loss = lambda batch: task.module(batch[0]).mean() * torch.nan
    with pytest.raises(ExportError, match="the loss is nan at step 1; a smaller rate"):
        train(task, settings(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / STATE).exists()


def test_outliers_are_the_papers():
    torch.manual_seed(0)
    state = towers.block()
    block = Block(state, Style(towers.HEADS), towers.WIDTH)
    block.load_state_dict(state)
    taken = {}
    block.mlp.register_forward_hook(lambda module, inputs, output: taken.setdefault("mlp", output.detach()))
    block.norm2.register_forward_pre_hook(lambda module, inputs: taken.setdefault("sum", inputs[0].detach()))
    with outliers(nn.ModuleList([block])) as seen:
        taken["out"] = block(torch.randn(3, 5, towers.WIDTH)).detach()
        figures = seen()
    norms, peaks = [], []
    for values in taken.values():
        rows = values.numpy().astype(np.float64).reshape(3, -1)
        norms.append(np.abs(rows).max(axis=1).mean())
        centred = rows - rows.mean(axis=1, keepdims=True)
        peaks.append(np.mean((centred**4).mean(axis=1) / (rows.var(axis=1, ddof=1) ** 2 + 1e-6)))
    assert figures["max_inf_norm"] == pytest.approx(max(norms), rel=1e-6)
    assert figures["max_kurtosis"] == pytest.approx(max(peaks), rel=1e-6)
    assert figures["avg_kurtosis"] == pytest.approx(np.mean(peaks), rel=1e-6)
    assert len(block._forward_hooks) == 0  # all hooks are removed


def test_a_figure_that_is_no_longer_a_number_stops_the_training(tmp_path):
    task = Line()
    task.measure = lambda: {"perplexity": float("inf")}
    with pytest.raises(ExportError, match="perplexity is inf at step 10; a smaller rate"):
        train(task, settings(tmp_path), tmp_path)


@pytest.mark.parametrize(("file", "holds"), [(STATE, b"PK"), (LOG, b"not ours\n"), (LOG, None)])
def test_a_state_that_cannot_be_read_is_said(file, holds, tmp_path):
    train(Line(), settings(tmp_path), tmp_path, until=20)
    (tmp_path / file).unlink()
    if holds is not None:
        (tmp_path / file).write_bytes(holds)
    with pytest.raises(BadRequest, match=r"cannot be read .*; delete both to start again"):
        train(Line(), settings(tmp_path), tmp_path)
