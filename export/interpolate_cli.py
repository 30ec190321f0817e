"""The verbs interpolate and sharpness. What needs torch is imported after the flags are read."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import emit, parser, positive, threads
from calmclip.models.errors import BadRequest

if TYPE_CHECKING:
    from calmclip.export.interpolate import Ends
    from calmclip.export.zero_shot import DataSet, Score

_LOSS_PICTURES, _LIMIT = 64, 500


def interpolate_command(argv: list[str]) -> int:
    """`calmclip interpolate A B --alphas 0:1:.1`: accuracy along the way, checkpoints, or both."""
    options = _parser("interpolate", "Mix two checkpoints of one layout, the weights 1 - alpha and alpha.", "0:1:.1")
    args = options.parse_args(argv)
    if not (args.data or args.out):
        raise BadRequest("expected --data DIR to measure along the way, --out DIR to write checkpoints, or both")
    if args.plot and not args.data:
        raise BadRequest("--plot draws the accuracy along the way; add --data DIR")
    sets = _data_sets(args.data)
    from calmclip.export import interpolate, zero_shot
    from calmclip.export.nets import ready
    from calmclip.models.evals.progress import progress

    alphas = interpolate.alphas(args.alphas)
    folders = {alpha: args.out / f"alpha-{alpha:g}" for alpha in alphas} if args.out else {}
    for folder in folders.values():
        interpolate.check_free(folder, args.replace)
    ends = _open(args)
    data = [zero_shot.read(name, path, ends.net, args.template, args.limit) for name, path in sets.items()]
    scores: list[list[Score]] = []
    rows: list[dict[str, Any]] = []
    for alpha in progress(alphas, "interpolate", "alpha", len(alphas)):
        state = ends.at(alpha)
        if folder := folders.get(alpha):
            interpolate.write(ends, state, folder, _note(ends, alpha=alpha), over=args.replace)
        net = ends.load(state)
        folded = ready(net) if data else net
        scores.append([zero_shot.score(folded, each) for each in data])
        rows.append({"alpha": alpha, "scale": zero_shot.scale(net), "checkpoint": str(folder) if folder else None})
    for place, each in enumerate(data):
        column = [row[place] for row in scores]
        for row, score, bounds in zip(rows, column, _differences(column), strict=True):
            row.setdefault("data", {})[each.name] = {
                "accuracy": score.accuracy, "loss": score.loss, "less_last_95": bounds
            }  # fmt: skip
    answer = {
        **_about(ends, data, args.alphas),
        "rows": rows,
        "barrier": {each.name: _barrier(alphas, [row[i].loss for row in scores]) for i, each in enumerate(data)},
    }
    if args.plot:
        _draw_curves(answer, args.plot)
    emit(args.json, answer, _show_path)
    return 0


def sharpness_command(argv: list[str]) -> int:
    """`calmclip sharpness A B --data DIR`: a table of layers and alphas, the stragglers, and B with pruned changes."""
    args = _sharpness_parser().parse_args(argv)
    if not args.data:
        raise BadRequest("expected --data DIR: the loss is computed on its pictures")
    if (args.prune is None) != (args.out is None):
        raise BadRequest("--prune PART and --out DIR belong together: DIR receives the pruned checkpoint")
    if args.prune is not None and not 0 <= args.prune <= 1:
        raise BadRequest(f"--prune is {args.prune}; expected the part to keep, from 0 to 1")
    sets = _data_sets(args.data)
    from pydantic import ValidationError

    from calmclip.export import interpolate, sharpness, zero_shot
    from calmclip.models.bundle.manifest import explain

    alphas = interpolate.alphas(args.alphas)
    try:
        how = sharpness.Ascent(rho=args.rho, steps=args.steps, restarts=args.restarts, seed=args.seed)
    except ValidationError as error:
        raise BadRequest(f"--rho, --steps, --restarts or --seed: {explain(error)}") from None
    if args.out:
        interpolate.check_free(args.out, args.replace)
    ends = _open(args)
    named = sharpness.layers(ends.net, modules=args.modules)
    if args.layers:
        named = {layer: named[layer] for layer in interpolate.chosen([*named], args.layers)}
    if args.prune is not None:
        interpolate.require_stored(ends, [*named])
    data = [zero_shot.read(name, path, ends.net, args.template, args.limit) for name, path in sets.items()]
    batch = data[0].some(args.pictures)
    sharpness.check(ends.net, batch)
    start = perf_counter()
    losses, values = sharpness.along(ends, alphas, batch, named, how)
    seconds = (perf_counter() - start) / (len(alphas) * len(named))
    peaks = {layer: max(row) for layer, row in values.items()}
    stragglers = sharpness.stragglers(peaks)
    answer = {
        **_about(ends, data, args.alphas),
        **how.model_dump(),
        "pictures": len(batch.truth),
        "alpha": list(alphas),
        "loss": losses,
        "layers": {layer: {"sharpness": row, "peak": peaks[layer]} for layer, row in values.items()},
        "stragglers": stragglers,
        "seconds_per_layer": seconds,
        "pruned": None,
    }
    if args.prune is not None:
        answer["pruned"] = _prune(ends, data, [*named] if args.layers else stragglers, args)
    if args.plot:
        from calmclip.export import chart

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        title = f"{answer['a']} to {answer['b']}: sharpness, rho {how.rho:g}"
        chart.layers(alphas, values, stragglers, args.plot, title)
    emit(args.json, answer, _show_layers)
    return 0


def _prune(ends: "Ends", data: "Sequence[DataSet]", layers: list[str], args: argparse.Namespace) -> dict[str, Any]:
    from calmclip.export import interpolate, zero_shot
    from calmclip.export.nets import ready

    def scored(state: "Mapping[str, Any]") -> "list[Score]":
        net = ready(ends.load(state))
        return [zero_shot.score(net, each) for each in data]

    state = interpolate.pruned(ends.a.tensors, ends.b.tensors, ends.layer_of(layers), args.prune)
    interpolate.write(ends, state, args.out, _note(ends, kept=args.prune, layers=layers), over=args.replace)
    pairs = zip(data, scored(ends.b.tensors), scored(state), strict=True)
    return {
        "layers": layers,
        "kept": args.prune,
        "checkpoint": str(args.out),
        "data": {
            each.name: {
                "before": before.accuracy, "after": after.accuracy, "loss_before": before.loss,
                "loss_after": after.loss, "gain_95": _differences([after, before])[0],
            }
            for each, before, after in pairs
        },
    }  # fmt: skip


def _parser(verb: str, description: str, alphas: str) -> argparse.ArgumentParser:
    options = parser(verb, description)
    options.add_argument("a", metavar="A", help="the zero-shot checkpoint: directory, file, hf:owner/name[@revision]")
    options.add_argument("b", metavar="B", help="the fine-tuned one, of the same layout")
    options.add_argument(
        "--alphas", default=alphas, help=f"FIRST:LAST:STEP, or numbers such as 0,.5,1 (default {alphas}); 0 is A, 1 B"
    )
    options.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]DIR",
        help="labels.json and images/, or a folder of pictures for each class; repeat it, such as for shifted pictures",
    )  # fmt: skip
    options.add_argument("--limit", type=positive, default=_LIMIT, help=f"pictures of a data set (default {_LIMIT})")
    options.add_argument("--template", action="append", default=[], help="a sentence with a {}; default: the net's")
    options.add_argument("--out", type=Path, metavar="DIR", help="checkpoints for `calmclip export`")
    options.add_argument("--replace", action="store_true", help="replace checkpoints in --out")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture of the result")
    options.add_argument(
        "--activation", choices=("gelu", "gelu_tanh", "quick_gelu"), help="if the checkpoints have none"
    )
    options.add_argument("--threads", type=threads, help="default: one per core")
    return options


def _sharpness_parser() -> argparse.ArgumentParser:
    options = _parser("sharpness", "Which layers lie on sharp ground between two checkpoints.", "0:1:.25")
    options.add_argument("--rho", type=float, default=0.05, help="radius of the ball, relative to a layer's weights")
    options.add_argument("--steps", type=int, default=5, help="of gradient ascent; 0: random directions alone")
    options.add_argument("--restarts", type=int, default=0, help="ascents from random points of the ball, besides")
    options.add_argument("--seed", type=int, default=0, help="of the random points")
    options.add_argument(
        "--pictures", type=positive, default=_LOSS_PICTURES, help="of the first data set, for the loss (default 64)"
    )
    options.add_argument("--modules", action="store_true", help="each module is a layer, instead of each block")
    options.add_argument(
        "--layers", nargs="+", metavar="NAME", default=(), help="measure these alone, such as 'image.blocks.*'"
    )
    options.add_argument(
        "--prune", type=float, metavar="PART",
        help="keep this part of what B changes in the stragglers (with --layers: in these), and write it to --out",
    )  # fmt: skip
    return options


def _data_sets(given: Sequence[str]) -> dict[str, Path]:
    sets: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or "/" in name:
            name, path = Path(text).resolve().name, text
        if name in sets:
            raise BadRequest(f"two data sets are called {name}; name them: --data {name}1={path}")
        sets[name] = Path(path)
    return sets


def _open(args: argparse.Namespace) -> "Ends":
    if args.plot:
        from calmclip.export import chart  # noqa: F401 - says at once that matplotlib is missing
    import torch

    from calmclip.export.checkpoints import Weights
    from calmclip.export.interpolate import open_ends

    if args.threads:
        torch.set_num_threads(args.threads)
    return open_ends(args.a, args.b, Weights(activation=args.activation))


def _about(ends: "Ends", data: "Sequence[DataSet]", alphas: str) -> dict[str, Any]:
    from calmclip.export.checkpoints import hub

    return {
        "a": hub.name(ends.a.path),
        "b": hub.name(ends.b.path),
        "layout": ends.layout.title,
        "alphas": alphas,
        "data": [{"name": d.name, "pictures": len(d.truth), "labels": len(d.labels)} for d in data],
    }


def _note(ends: "Ends", **facts: Any) -> str:
    from calmclip.export.checkpoints import hub

    return json.dumps({"a": hub.name(ends.a.path), "b": hub.name(ends.b.path), **facts})


def _differences(scores: "Sequence[Score]") -> list[list[float] | None]:
    """For each score the bounds of 95 % of its accuracy less that of the last one, by a paired bootstrap over pictures;
    None for one picture, and without scipy, of the extra `eval`."""
    import numpy as np

    from calmclip.models.evals.bootstrap import Resampling, intervals

    right = np.stack([score.right for score in scores]).astype(float)
    more = 100 * (right - right[-1])
    if right.shape[1] < 2:
        return [None] * len(scores)
    try:
        low, high = intervals(lambda rows: more[:, rows].mean(axis=1), right.shape[1], Resampling())
    except ModuleNotFoundError:
        return [None] * len(scores)
    return [list(pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]


def _barrier(alphas: Sequence[float], losses: Sequence[float]) -> float:
    """How far the loss rises over the line between its ends (Frankle et al. 2020, arXiv 1912.05671, section 2)."""
    first, last, width = losses[0], losses[-1], alphas[-1] - alphas[0]
    line = [first + (last - first) * ((alpha - alphas[0]) / width if width else 0) for alpha in alphas]
    return max(loss - level for loss, level in zip(losses, line, strict=True))


def _draw_curves(answer: Mapping[str, Any], file: Path) -> None:
    from calmclip.export import chart

    rows, names = answer["rows"], [each["name"] for each in answer["data"]]
    panels = {
        title: {name: [row["data"][name][key] for row in rows] for name in names}
        for key, title in (("accuracy", "accuracy, %"), ("loss", "loss, nats"))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.curves([row["alpha"] for row in rows], panels, file, f"{answer['a']} (0) to {answer['b']} (1)")


def _show_path(answer: dict[str, Any]) -> None:
    names = [each["name"] for each in answer["data"]]
    _show_head(answer)
    print(f"{'alpha':>6s} {'scale':>7s}" + "".join(f"  {name[:14]:>14s} %   loss   less the last" for name in names))
    for row in answer["rows"]:
        cells = ""
        for name in names:
            figures = row["data"][name]
            bounds = figures["less_last_95"]
            between = f"{bounds[0]:+.1f} to {bounds[1]:+.1f}" if bounds else "-"
            cells += f"  {figures['accuracy']:16.2f} {figures['loss']:6.3f} {between:>15s}"
        print(f"{row['alpha']:6g} {row['scale']:7.2f}{cells}  {row['checkpoint'] or ''}".rstrip())
    for name, height in answer["barrier"].items():
        print(f"barrier on {name}: the loss rises {height:.3f} nats over the line between its ends")


def _show_layers(answer: dict[str, Any]) -> None:
    _show_head(answer)
    width = max(map(len, answer["layers"]))
    print(f"{'alpha':{width}s}" + "".join(f" {alpha:8g}" for alpha in answer["alpha"]))
    print(f"{'loss':{width}s}" + "".join(f" {loss:8.3f}" for loss in answer["loss"]))
    for layer, row in answer["layers"].items():
        mark = "  straggler" if layer in answer["stragglers"] else ""
        print(f"{layer:{width}s}" + "".join(f" {value:8.4f}" for value in row["sharpness"]) + mark)
    print(
        f"growth of the loss on {answer['pictures']} pictures, rho {answer['rho']:g}; "
        f"{answer['seconds_per_layer']:.2f} s for a layer and alpha"
    )
    if pruned := answer["pruned"]:
        print(f"kept {pruned['kept']:g} of the changes in {', '.join(pruned['layers'])}: {pruned['checkpoint']}")
        for name, figures in pruned["data"].items():
            bounds = figures["gain_95"]
            gain = f" ({bounds[0]:+.1f} to {bounds[1]:+.1f})" if bounds else ""
            print(f"  {name:16s} accuracy {figures['before']:.2f} -> {figures['after']:.2f}{gain}")


def _show_head(answer: dict[str, Any]) -> None:
    sets = ", ".join(f"{d['name']} ({d['pictures']} pictures, {d['labels']} labels)" for d in answer["data"])
    print(f"{answer['a']} (alpha 0) to {answer['b']} (alpha 1); {answer['layout']}" + f"; {sets}" * bool(sets))
