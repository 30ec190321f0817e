"""The loop: steps of AdamW, a log, a state to resume from. The random draw of a step depends on the seed and the step's
number only, so a training that stops and resumes ends with the same weights.

Source: Loshchilov and Hutter 2017 (arXiv 1711.05101).
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from calmclip.export.checkpoints.locate import one_line
from calmclip.export.towers.transformer import Block
from calmclip.export.training.objectives import Task
from calmclip.export.training.settings import LOG, STATE, Schedule
from calmclip.models.errors import BadRequest, ExportError


def train(task: Task, settings: Schedule, out: Path, *, until: int | None = None) -> dict[str, Any]:
    """Train ``task.module`` in place; -> the last line of the log. ``out`` holds LOG and STATE.

    Resumes from a state in ``out``. ``until``: stop after so many steps, as if interrupted. Raises `BadRequest` if the
    state has other settings, `ExportError` if the loss or a figure is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    module, optimizer = task.module, _optimizer(task.module, settings)
    done, seconds = _resume(module, optimizer, settings, out)
    line: dict[str, Any] = _lines(out)[-1] if done else {}
    last = min(until or settings.steps, settings.steps)
    start = perf_counter() - seconds
    bar = tqdm(range(done, last), initial=done, total=settings.steps, desc=out.name, unit="step", disable=None)
    for step in bar:
        rate = settings.rate * min(1.0, (step + 1) / max(1, settings.warmup)) * (1 - step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = task.batch(np.random.default_rng((settings.seed, step)))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            loss = task.loss(batch)
        _check({"the loss": float(loss.detach())}, step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        optimizer.step()
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            module.eval()
            with torch.inference_mode(), outliers(module) as outlier_figures:
                measured = task.measure()
            module.train()
            figures = {**measured, **outlier_figures()}
            _check(figures, step)
            line = {
                "step": step + 1,
                "seconds": round(perf_counter() - start, 1),
                "loss": round(float(loss.detach()), 4),
                **{name: round(value, 4) for name, value in figures.items()},
            }
            with (out / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix({key: line[key] for key in ("loss", *measured, "max_inf_norm")})
            _save(module, optimizer, settings, step + 1, perf_counter() - start, out)
    return line


def _check(figures: Mapping[str, float], step: int) -> None:
    """Raises `ExportError` if a figure is not finite."""
    if name := next((name for name, value in figures.items() if not math.isfinite(value)), None):
        raise ExportError(f"{name} is {figures[name]} at step {step + 1}; a smaller rate or a longer warmup may help")


def _optimizer(module: nn.Module, settings: Schedule) -> torch.optim.Optimizer:
    decayed = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
        if not name.endswith("bias") and (settings.decay_norms or not isinstance(part, nn.LayerNorm))
    }
    groups = [
        {"params": [p for name, p in module.named_parameters() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, settings.decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, settings.beta2), fused=True)


def _resume(module: nn.Module, optimizer: torch.optim.Optimizer, settings: Schedule, out: Path) -> tuple[int, float]:
    """-> the number of finished steps, and their seconds."""
    if not (out / STATE).is_file():
        (out / LOG).unlink(missing_ok=True)
        return 0, 0.0
    try:
        state = torch.load(out / STATE, weights_only=True)
        lines = [line for line in _lines(out) if line["step"] <= state["step"]]
    except Exception as error:  # any error of torch, or a log of another program
        raise BadRequest(
            f"{out / STATE} and {LOG} beside it cannot be read ({one_line(error)}); delete both to start again"
        ) from None
    # a setting that is newer than the state has its default, which changes nothing
    if not _same(state["settings"], settings):
        raise BadRequest(f"{out / STATE} is of a training with other settings; use those, or choose another --out")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    (out / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return state["step"], state["seconds"]


def _same(saved: str, settings: Schedule) -> bool:
    try:
        return type(settings).model_validate_json(saved) == settings
    except ValidationError:  # of another kind of training, or a setting that is gone
        return False


def _lines(out: Path) -> list[dict[str, Any]]:
    complete = (out / LOG).read_text(encoding="utf-8").split("\n")[:-1]  # an interrupted write has no line end
    return [json.loads(line) for line in complete]


def _save(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: Schedule, step: int, seconds: float, out: Path
) -> None:
    """Write the state atomically."""
    state = {"settings": settings.model_dump_json(), "step": step, "seconds": seconds}
    torch.save({**state, "module": module.state_dict(), "optimizer": optimizer.state_dict()}, out / f"{STATE}.new")
    os.replace(out / f"{STATE}.new", out / STATE)


@contextmanager
def outliers(module: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Measure outliers while the context is open, in the outputs of each block and of its MLP, and in the sum that its
    second norm reads; -> a function that returns the figures. `calmclip.export.outliers` measures more."""
    norms: dict[str, list[Tensor]] = {}
    kurtoses: dict[str, list[Tensor]] = {}

    def record(name: str, values: Tensor) -> None:
        flat = values.detach().double().flatten(1)
        centred = flat - flat.mean(dim=1, keepdim=True)
        norms.setdefault(name, []).append(flat.abs().amax(dim=1))
        kurtoses.setdefault(name, []).append((centred**4).mean(dim=1) / (flat.std(dim=1) ** 4 + 1e-6))

    hooks = []
    for name, block in module.named_modules():
        if isinstance(block, Block):
            hooks += [
                block.mlp.register_forward_hook(partial(_output, record, f"{name}.mlp")),
                block.norm2.register_forward_pre_hook(partial(_input, record, f"{name}.norm2")),
                block.register_forward_hook(partial(_output, record, name)),
            ]

    def figures() -> dict[str, float]:
        largest = [float(torch.cat(parts).mean()) for parts in norms.values()]
        peaks = [float(torch.cat(parts).mean()) for parts in kurtoses.values()]
        return {
            "max_inf_norm": max(largest, default=0.0),
            "avg_kurtosis": float(np.mean(peaks)) if peaks else 0.0,
            "max_kurtosis": max(peaks, default=0.0),
        }

    try:
        yield figures
    finally:
        for hook in hooks:
            hook.remove()


def _output(record: Any, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    record(name, output)


def _input(record: Any, name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    record(name, inputs[0])
