"""The verb eval: one bundle or two, on a data directory or from saved samples."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from calmclip.models.cli import bundle_options, emit, key_values, parser, positive
from calmclip.models.errors import BadRequest
from calmclip.models.registry import catalog


def eval_command(argv: list[str]) -> int:
    """`calmclip eval BUNDLE EVAL --data DIR [--against BUNDLE]`, or `calmclip eval --from FILE [FILE]`."""
    args = _parser().parse_args(argv)
    if bool(args.files) == bool(args.bundle):
        raise BadRequest(
            "expected a bundle and an eval (calmclip eval mini-int8 zero_shot --data DIR), or files of samples "
            "(calmclip eval --from a.npz b.npz)"
        )
    if args.html:
        from calmclip.models.evals import page

        page.require()
    from pydantic import ValidationError

    from calmclip.models.bundle.manifest import explain
    from calmclip.models.evals.bootstrap import Resampling
    from calmclip.models.evals.samples import Samples, write
    from calmclip.models.evals.tables import tabulate, text

    params = {**(_recipe(args.params) if args.params else {}), **key_values(args.param)}
    try:
        how = Resampling(resamples=args.resamples, method=args.method, seed=args.seed)
    except ValidationError as error:
        raise BadRequest(f"--resamples, --method or --seed: {explain(error)}") from None
    if args.files:
        sides = [Samples.load(file) for file in args.files]
        table = tabulate(sides, params, how)
    else:
        sides = _measured(args, params)
        table = tabulate(sides, {}, how)
    if args.html:
        content = page.html(table, sides, params).encode()
        write(args.html, lambda file: file.write(content))
    emit(args.json, table.as_json(), lambda _: print(text(table)))
    return 0


def _measured(args: argparse.Namespace, params: dict[str, Any]) -> list[Any]:
    """Samples of the bundle and of the second one. With --save, each is saved at once."""
    from calmclip.models.bundle.store import find
    from calmclip.models.evals import EVALS, measure
    from calmclip.models.runner import open_bundle

    if not (args.eval and args.data):
        raise BadRequest(f"expected an eval and --data DIR; evals: {', '.join(catalog('evals'))}")
    directories = [find(args.bundle, args.bundles)]
    if args.against:
        directories.append(find(args.against, args.bundles))
    elif sibling := float_of(directories[0]):
        directories.append(sibling)
    measured = EVALS.get(args.eval)
    if args.full:
        params, limit = {**measured.full, **params}, args.limit
    else:
        limit = args.limit or measured.limit
    data = measure.read(args.eval, args.data, params, limit)
    sides = []
    for directory in directories:
        runner = open_bundle(directory, threads=args.threads, ops=args.ops)
        sides.append(samples := measure.predict(args.eval, runner, data, params))
        if args.save:
            file = args.save / f"{runner.bundle.name}.{args.eval}.npz"
            samples.save(file)
            print(f"calmclip: samples of {runner.bundle.name} are in {file}", file=sys.stderr)
    return sides


def _recipes() -> dict[str, Path]:
    """Name -> the file of an eval's params that ships with calmclip."""
    return {file.stem: file for file in (Path(__file__).parent / "evals" / "recipes").glob("*.json")}


def _recipe(name: str) -> dict[str, Any]:
    """The params in a file, or in the recipe of that name. Raises `BadRequest`."""
    file = _recipes().get(name, Path(name))
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"--params {name} cannot be read ({error}); expected a JSON file of params, or one of the recipes "
            f"{', '.join(sorted(_recipes()))}"
        ) from None
    if not isinstance(params, dict):
        raise BadRequest(f'--params {name} holds no JSON object; expected {{"param": value}}')
    return params


def _parser() -> argparse.ArgumentParser:
    options = parser("eval", "Measure a bundle on a data set, INT8 beside float, or score saved samples.")
    options.add_argument("bundle", nargs="?")
    options.add_argument("eval", nargs="?", help=f"one of {', '.join(catalog('evals'))}")
    options.add_argument("--data", type=Path, help="directory of the data set")
    options.add_argument("--against", help="a second bundle; default: the float one sealed beside an INT8 one")
    options.add_argument("--limit", type=positive, help="at most this many pictures; default: two minutes of them")
    options.add_argument("--full", action="store_true", help="the whole data set, and every step of the eval")
    options.add_argument(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="of the eval; a value may be JSON"
    )
    options.add_argument(
        "--params", metavar="FILE", help=f"params of the eval as JSON, or a recipe: {', '.join(sorted(_recipes()))}"
    )
    options.add_argument("--save", type=Path, metavar="DIR", help="keep the samples: DIR/BUNDLE.EVAL.npz")
    options.add_argument(
        "--from", dest="files", nargs="+", type=Path, metavar="FILE", help="score saved samples, of one bundle or two"
    )
    options.add_argument("--html", type=Path, metavar="FILE", help="write table and plots as a page")
    options.add_argument("--resamples", type=positive, default=1000, help="of the pictures, for intervals")
    options.add_argument("--method", choices=("percentile", "BCa"), default="percentile", help="of the intervals")
    options.add_argument("--seed", type=int, default=0, help="of the resampling")
    bundle_options(options)
    return options


def float_of(directory: Path) -> Path | None:
    """NAME-float beside NAME-int8 or NAME-mixed, if it has the same weights."""
    from calmclip.models.bundle.manifest import MANIFEST
    from calmclip.models.bundle.store import read

    other = directory.with_name(directory.name.removesuffix("-int8").removesuffix("-mixed") + "-float")
    if other == directory or not (other / MANIFEST).is_file():
        return None
    same = read(other, verify=False).manifest.source == read(directory, verify=False).manifest.source
    return other if same else None
