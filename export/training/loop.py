"""The loop: steps of AdamW, a log, a state to go on from. A step's draw hangs on the seed and its number alone, so a
training that was stopped and goes on ends with the same weights.

Source: Loshchilov and Hutter 2017 (arXiv 1711.05101).
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from calmclip.export.checkpoints.weights import one_line
from calmclip.export.towers.transformer import Block
from calmclip.export.training.objectives import Task
from calmclip.export.training.settings import LOG, STATE, Training
from calmclip.models.errors import BadRequest, ExportError


def train(task: Task, settings: Training, out: Path, *, until: int | None = None) -> dict[str, Any]:
    """Train ``task.module`` in place; -> the last line of the log. ``out`` holds LOG, and STATE until all is done.

    Goes on where a state lies in ``out``. ``until``: stop there, as if interrupted. Raises `BadRequest` where the state
    is of other settings, `ExportError` where the loss is no longer a number.
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
        if not loss.isfinite():
            raise ExportError(
                f"the loss is {float(loss.detach())} at step {step + 1}; a smaller rate or a longer warmup may help"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        optimizer.step()
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            module.eval()
            with torch.inference_mode(), outliers(module) as seen:
                measured = task.measure()
            module.train()
            figures = {**measured, **seen()}
            if odd := [name for name, value in figures.items() if not math.isfinite(value)]:
                raise ExportError(
                    f"{odd[0]} is {figures[odd[0]]} at step {step + 1}; a smaller rate or a longer warmup may help"
                )
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


def _optimizer(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    decayed = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
        if not name.endswith("bias") and (settings.decay_norms or not isinstance(part, nn.LayerNorm))
    }
    groups = [
        {"params": [p for name, p in module.named_parameters() if (name in decayed) == yes], "weight_decay": decay}
        for yes, decay in ((True, settings.decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, settings.beta2), fused=True)


def _resume(module: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, out: Path) -> tuple[int, float]:
    """-> steps that are done, and the seconds they took."""
    if not (out / STATE).is_file():
        (out / LOG).unlink(missing_ok=True)
        return 0, 0.0
    try:
        found = torch.load(out / STATE, weights_only=True)
        kept = [line for line in _lines(out) if line["step"] <= found["step"]]
    except Exception as error:  # whatever torch raises, or a log that is not ours
        raise BadRequest(
            f"{out / STATE} and {LOG} beside it cannot be gone on from ({one_line(error)}); delete them to begin anew"
        ) from None
    if found["settings"] != settings.model_dump_json():
        raise BadRequest(
            f"{out / STATE} is of a training with other settings; go on with those, or choose another --out"
        )
    module.load_state_dict(found["module"])
    optimizer.load_state_dict(found["optimizer"])
    (out / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    return found["step"], found["seconds"]


def _lines(out: Path) -> list[dict[str, Any]]:
    whole = (out / LOG).read_text(encoding="utf-8").split("\n")[:-1]  # one that was cut off has no end
    return [json.loads(line) for line in whole]


def _save(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, step: int, seconds: float, out: Path
) -> None:
    """Whole or not at all."""
    state = {"settings": settings.model_dump_json(), "step": step, "seconds": seconds}
    torch.save({**state, "module": module.state_dict(), "optimizer": optimizer.state_dict()}, out / f"{STATE}.new")
    os.replace(out / f"{STATE}.new", out / STATE)


@contextmanager
def outliers(module: nn.Module) -> Iterator[Any]:
    """While it is open the outliers of what each block's MLP answers and of what each block answers or, where a norm
    follows the sum, of that sum are watched; -> a function that says them. `calmclip.export.outliers` measures more."""
    norms: dict[str, list[Tensor]] = {}
    kurtoses: dict[str, list[Tensor]] = {}

    def see(name: str, values: Tensor) -> None:
        flat = values.detach().double().flatten(1)
        apart = flat - flat.mean(dim=1, keepdim=True)
        norms.setdefault(name, []).append(flat.abs().amax(dim=1))
        kurtoses.setdefault(name, []).append((apart**4).mean(dim=1) / (flat.std(dim=1) ** 4 + 1e-6))

    hooks = []
    for name, block in module.named_modules():
        if isinstance(block, Block):
            hooks += [
                block.mlp.register_forward_hook(partial(_answered, see, f"{name}.mlp")),
                block.norm2.register_forward_pre_hook(partial(_read, see, f"{name}.norm2")),
                block.register_forward_hook(partial(_answered, see, name)),
            ]

    def said() -> dict[str, float]:
        largest = [float(torch.cat(parts).mean()) for parts in norms.values()]
        peaks = [float(torch.cat(parts).mean()) for parts in kurtoses.values()]
        return {
            "max_inf_norm": max(largest, default=0.0),
            "avg_kurtosis": float(np.mean(peaks)) if peaks else 0.0,
            "max_kurtosis": max(peaks, default=0.0),
        }

    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def _answered(see: Any, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    see(name, output)


def _read(see: Any, name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    see(name, inputs[0])
