"""The verbs train, distil and demonstrate."""

import json
import tomllib
import types
import typing
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calmclip.models.cli import bundle_options, emit, parser, positive, threads
from calmclip.models.errors import BadRequest

if TYPE_CHECKING:
    from pydantic import BaseModel


def train_command(argv: list[str]) -> int:
    """`calmclip train OBJECTIVE --out DIR …`: a Hugging Face directory, which `calmclip export` reads."""
    from calmclip.export.training.settings import Training, training

    options = parser("train", "Train a net for quantization, new or from a checkpoint; resumes where it stopped.")
    options.add_argument("objective", choices=typing.get_args(Training.model_fields["objective"].annotation))
    options.add_argument("--out", type=Path, required=True, help="directory of the checkpoint, the log and the state")
    options.add_argument("--settings", type=Path, help="TOML file with the settings below; a flag overrides it")
    options.add_argument("--threads", type=threads, help="default: one per core")
    _flags(options, Training)
    args = options.parse_args(argv)
    import torch

    from calmclip.export.training.loop import train
    from calmclip.export.training.start import student
    from calmclip.export.training.write import write

    if args.threads:
        torch.set_num_threads(args.threads)
    flags = {name: value for name, value in vars(args).items() if name in Training.model_fields and value is not None}
    settings = training(**_toml(args.settings) | flags)
    trained = student(settings, args.out)
    line = train(trained.task, settings, args.out)
    write(trained, args.out)
    emit(args.json, {"directory": str(args.out), **line}, _show)
    return 0


def distil_command(argv: list[str]) -> int:
    """`calmclip distil --teacher BUNDLE --texts FILE --student CHECKPOINT --out DIR`: a checkpoint directory."""
    from calmclip.export.training.settings import Distillation, checked

    options = parser("distil", "Train a text tower towards the vectors of another bundle; resumes where it stopped.")
    options.add_argument("--teacher", required=True, help="a bundle that embeds texts")
    options.add_argument(
        "--student", required=True, help="a directory of sentence-transformers, or mini: its tower of many languages"
    )
    options.add_argument("--out", type=Path, required=True, help="directory of the checkpoint, the logs and the states")
    options.add_argument("--settings", type=Path, help="TOML file with the settings below; a flag overrides it")
    _flags(options, Distillation)
    bundle_options(options)
    args = options.parse_args(argv)
    flags = {name: v for name, v in vars(args).items() if name in Distillation.model_fields and v is not None}
    settings = checked(Distillation, _toml(args.settings) | flags)
    import torch

    from calmclip.export.training.distillation import distil
    from calmclip.models.bundle.store import find
    from calmclip.models.runner import open_bundle

    if args.threads:
        torch.set_num_threads(args.threads)
    teacher = open_bundle(find(args.teacher, args.bundles), threads=args.threads, ops=args.ops)
    facts = distil(teacher, args.student, settings, args.out)
    line = {"directory": str(args.out), **facts["figures"]}
    emit(args.json, {**facts, "directory": str(args.out)}, lambda value: _show(line))
    return 0


def demonstrate_command(argv: list[str]) -> int:
    """`calmclip demonstrate RECIPE`: vanilla, clipped and gated nets, trained, quantized, measured: a table."""
    from calmclip.export.training import shipped

    options = parser("demonstrate", "Train vanilla, clipped and gated nets, quantize them, and compare.")
    options.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(shipped())}; or a .toml file of yours")
    options.add_argument(
        "--out", type=Path, default=Path("demonstration"), help="directory of all files; an interrupted run resumes"
    )
    options.add_argument("--text", type=Path, help="text instead of the dictionary: one document a line")
    options.add_argument("--jobs", type=positive, help="concurrent trainings, one thread each; default: one per core")
    args = options.parse_args(argv)
    from calmclip.export.training.demonstration import demonstrate, results_file

    log = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    table = demonstrate(args.recipe, args.out, text=args.text, jobs=args.jobs, log=log)
    results = json.loads(results_file(args.recipe, args.out).read_text(encoding="utf-8"))
    emit(args.json, {"table": table, "results": results}, lambda value: print(value["table"], end=""))
    return 0


def _flags(options: ArgumentParser, model: "type[BaseModel]") -> None:
    """One flag for each field of ``model`` but the objective."""
    for name, field in model.model_fields.items():
        if name == "objective":
            continue
        kind, flag = _kind(field.annotation), f"--{name.replace('_', '-')}"
        default = "" if field.is_required() or field.default is None else f" (default {field.default})"
        words = f"{field.description or ''}{default}".strip().replace("%", "%%")
        if kind is bool:
            options.add_argument(flag, action=BooleanOptionalAction, help=words)
        elif typing.get_origin(kind) is Literal:
            options.add_argument(flag, choices=typing.get_args(kind), help=words)
        else:
            options.add_argument(flag, type=kind, help=words)


def _kind(annotation: Any) -> Any:
    """The type of a flag's value: X for ``X | None`` and for ``Annotated[X, …]``."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(member for member in typing.get_args(annotation) if member is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _toml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"settings {file} cannot be read ({error}); expected a TOML file") from None


def _show(value: dict[str, Any]) -> None:
    figures = ", ".join(f"{key} {number}" for key, number in value.items() if key not in ("directory", "step"))
    print(f"{value['directory']}: {value.get('step', 0)} steps, {figures}")
    print(f"calmclip export {value['directory']}")
