"""The command line: `calmclip VERB …`. A verb's module is imported when the verb is used.

Exit status: 0 success, 1 a check failed, 2 bad usage or bad input, 3 an extra is missing.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from calmclip.models.errors import BadRequest, BarMissed, CalmclipError, ExtraMissing, ParityLost, suggestion
from calmclip.models.extras import extra_of, missing

BUNDLES = Path("models/bundles")
BUNDLES_VARIABLE = "CALMCLIP_BUNDLES_DIR"  # the setting of the service, for every verb
MOST_THREADS = 1024

# verb -> (function, description)
VERBS: dict[str, tuple[str, str]] = {
    "export": ("calmclip.export.cli:export_command", "checkpoint directory, or 'mini', -> INT8 bundle"),
    "align": (
        "calmclip.export.align_cli:align_command",
        "train the built-in model's projections on your own captioned pictures",
    ),
    "teach": ("calmclip.export.teach_cli:teach_command", "train the built-in detector on your own photographs"),
    "train": ("calmclip.export.training.cli:train_command", "train a net for INT8, new or from a checkpoint"),
    "distil": ("calmclip.export.training.cli:distil_command", "train a text tower towards another bundle's vectors"),
    "demonstrate": ("calmclip.export.training.cli:demonstrate_command", "vanilla, clipped and gated nets side by side"),
    "interpolate": (
        "calmclip.export.interpolate_cli:interpolate_command",
        "checkpoints between two, and accuracy along the way",
    ),
    "sharpness": (
        "calmclip.export.interpolate_cli:sharpness_command",
        "layers on sharp ground between two checkpoints; prune their changes",
    ),
    "recipe": ("calmclip.export.cli:recipe_command", "print the recipe that export would use"),
    "show": ("calmclip.models.commands:show_command", "manifest and report of a bundle as a table"),
    "check": ("calmclip.models.commands:check_command", "hashes, schema, one self-test per graph"),
    "run": ("calmclip.models.commands:run_command", "a task from the command line: classify, embed, detect, …"),
    "index": ("calmclip.service.cli:index_command", "embed a folder of pictures into a collection"),
    "search": ("calmclip.service.cli:search_command", "the nearest items of a collection to a text or a picture"),
    "collection": (
        "calmclip.service.cli:collection_command",
        "create, list, show, items, delete, export, import, re-embed, remove: collections, of a store or a service",
    ),
    "eval": ("calmclip.models.eval_cli:eval_command", "accuracy on a data set, INT8 beside float"),
    "resilience": (
        "calmclip.export.resilience.cli:resilience_command",
        "inject, calibrate: flipped bits, and bounds against them",
    ),
    "fit": ("calmclip.models.fit_cli:fit_command", "a classifier, fitted to a folder of pictures for each class"),
    "bench": ("calmclip.models.commands:bench_command", "latency of a bundle's graphs, one bundle against another"),
    "ops": ("calmclip.models.ops.commands:ops_command", "build, info, check: the compiled operators"),
    "plugins": ("calmclip.models.commands:plugins_command", "names in every plug-in family"),
    "serve": ("calmclip.service.cli:serve_command", "answer over HTTP"),
    "keys": ("calmclip.service.cli:keys_command", "add, list, remove: the keys of a service"),
    "completion": ("calmclip.models.completion:completion_command", "print the completion script of bash, zsh or fish"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from calmclip import __version__

        print(f"calmclip {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        print(f"calmclip: there is no verb {verb!r}; {suggestion(verb, VERBS)}", file=sys.stderr)
        return 2
    try:
        module, function = VERBS[verb][0].split(":")
        return int(getattr(import_module(module), function)(argv[1:]))
    except (BarMissed, ParityLost) as error:
        return _fail(error, 1)
    except ExtraMissing as error:
        return _fail(error, 3)
    except CalmclipError as error:
        return _fail(error, 2)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "", builtin="mini" in argv)
        if extra is None:
            raise
        return _fail(missing(f"calmclip {verb}", error.name or "", extra), 3)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has closed the pipe
        sys.stderr.close()
        return 0
    except FileNotFoundError as error:
        return _fail(f"{error.filename} does not exist", 2)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2)


def usage() -> str:
    lines = [f"  {verb:12s} {text}" for verb, (_, text) in VERBS.items()]
    return "usage: calmclip VERB …   ('calmclip VERB --help' says more; every verb takes --json)\n\n" + "\n".join(lines)


class Collected(BaseException):
    """The parser of a verb that was asked for it, see `parser_of`."""

    def __init__(self, options: argparse.ArgumentParser) -> None:
        super().__init__()
        self.options = options


class _Parser(argparse.ArgumentParser):
    collects = False

    def parse_known_args(self, *args: Any, **more: Any) -> Any:
        if _Parser.collects:
            raise Collected(self)
        return super().parse_known_args(*args, **more)

    def parse_known_intermixed_args(self, *args: Any, **more: Any) -> Any:
        if _Parser.collects:
            raise Collected(self)
        return super().parse_known_intermixed_args(*args, **more)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser that a verb reads its arguments by. The verb itself does not run. Raises `ModuleNotFoundError` if a
    package of its extra is missing that its flags need."""
    module, function = VERBS[verb][0].split(":")
    _Parser.collects = True
    try:
        getattr(import_module(module), function)([])
    except Collected as collected:
        return collected.options
    finally:
        _Parser.collects = False
    raise AssertionError(f"the verb {verb} reads its arguments by no parser of ours")


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of a verb, with the flags that all verbs have."""
    options = _Parser(prog=f"calmclip {verb}", description=description)
    options.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return options


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def threads(text: str) -> int:
    """The argparse type of every ``--threads``: 0 stands for one per core."""
    if not text.isdecimal() or int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of threads: a whole number from 0, one per core, to {MOST_THREADS}"
        )
    return int(text)


def bundles_folder() -> Path:
    """Where bundles are if no flag says it: CALMCLIP_BUNDLES_DIR, else models/bundles."""
    return Path(os.environ.get(BUNDLES_VARIABLE) or BUNDLES)


def key_values(items: Sequence[str]) -> dict[str, Any]:
    """The values of `--param KEY=VALUE`; a value that is not JSON is text. Raises `BadRequest`."""
    params: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not (key and sign):
            raise BadRequest(f"--param {item!r} is not KEY=VALUE, such as bins=20")
        if key in params:
            raise BadRequest(f'--param {key} is given twice; a list is JSON: {key}=\'["…", "…"]\'')
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value
    return params


def bundles_option(options: Any, default: Path | None = None) -> None:
    """``options``: a parser, or a group of one."""
    options.add_argument(
        "--bundles", type=Path, metavar="DIR", default=default or bundles_folder(),
        help=f"directory of bundles; default: {BUNDLES_VARIABLE}, else {BUNDLES}",
    )  # fmt: skip


def bundle_options(
    options: argparse.ArgumentParser, *, cores: int = 0, defaults: argparse.Namespace | None = None
) -> None:
    """The flags of all verbs that open a bundle. ``cores``: the default of ``--threads``. ``defaults``: the values of
    an earlier parser of the same command line."""
    ops = os.environ.get("CALMCLIP_OPS") or "auto"
    defaults = defaults or argparse.Namespace(bundles=bundles_folder(), threads=cores, ops=ops)
    bundles_option(options, defaults.bundles)
    options.add_argument("--threads", type=threads, default=defaults.threads, help="0: one per core")
    options.add_argument(
        "--ops", type=ops_mode, default=defaults.ops,
        help="the op library: auto (if there is one), required, all (required, and no operator is left to ONNX "
        "Runtime) or off; default: CALMCLIP_OPS, else auto",
    )  # fmt: skip
    options.add_argument(
        "--without", type=_without, metavar="SETS", default=argparse.SUPPRESS,
        help="instruction sets whose kernels do not run, e.g. avx512,vnni,vbmi; default: CALMCLIP_OPS_WITHOUT",
    )  # fmt: skip


def ops_mode(text: str) -> str:
    """An argparse type, also for the environment's value."""
    from calmclip.models.ops.library import MODES

    if text not in MODES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(MODES)}")
    return text


def _without(text: str) -> str:
    """An argparse type. It masks at once, because a mask holds for the process, not for a bundle."""
    from calmclip.models.ops.library import mask

    try:
        mask(text.split(","))
    except BadRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def emit(as_json: bool, value: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """Print the answer of a verb, as JSON or as text."""
    if as_json:
        print(json.dumps(value))
    else:
        show(value)


def _fail(message: object, status: int) -> int:
    print(f"calmclip: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
