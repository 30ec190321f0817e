"""The verb fit: a folder of pictures for each class -> a classifier in a folder, as the service reads it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import bundle_options, emit, key_values, parser
from calmclip.models.errors import BadRequest, InputError

if TYPE_CHECKING:
    from calmclip.models.flow import Array, Flow

CLASSIFIERS = Path("data/classifiers")  # of a service with the default CALMCLIP_DATA_DIR
CROPS = 10  # of --augment without a number


def fit_command(argv: list[str]) -> int:
    """`calmclip fit NAME --bundle B --method M --pictures DIR`: a classifier and its report."""
    args = _parser().parse_args(argv)
    from calmclip.models.bundle.store import find
    from calmclip.models.classifier import Classifier
    from calmclip.models.datasets import CLASSES, lines, pictures_in, read_classes
    from calmclip.models.evals.progress import progress
    from calmclip.models.runner import open_bundle
    from calmclip.models.stored_classifier import ClassifierFolder
    from calmclip.models.tasks.fit import FitRequest, fit_rows, picture_flows, prepare

    folder = ClassifierFolder(args.out)
    if not args.replace:  # known before the pictures are read
        folder.require_free(args.name)
    if not (args.pictures or (args.unlabelled and args.label)):
        raise BadRequest(
            f"there are no pictures; give --pictures DIR ({CLASSES}), or --unlabelled DIR and each --label"
        )
    classes = read_classes(args.pictures) if args.pictures else {}
    labels = tuple(args.label or classes)
    pictures, truth = _labelled(classes, labels, args.pictures)
    unlabelled = pictures_in(args.unlabelled) if args.unlabelled else []
    if args.unlabelled and not unlabelled:
        raise BadRequest(f"{args.unlabelled} has no picture; expected a folder of pictures without a label")
    request = FitRequest(
        pictures,
        truth,
        Classifier(labels, tuple(args.template)),
        args.method,
        key_values(args.param),
        captions=_captions(args.captions, args.pictures, pictures) if args.captions else (),
        validation=_labelled(read_classes(args.validation), labels, args.validation) if args.validation else None,
        augment=args.augment,
        unlabelled=unlabelled,
        words=lines(args.words) if args.words else (),
    )
    runner = open_bundle(find(args.bundle, args.bundles), threads=args.threads, ops=args.ops)
    prepare(runner.bundle, request)
    paths = [*pictures, *(request.validation[0] if request.validation else ()), *unlabelled]
    flows = map(_named, picture_flows(runner.bundle, request), paths)
    rows = progress(runner.map(flows), "pictures", " pictures", len(paths))
    fitted = runner.run(fit_rows(runner.bundle, request, [*rows]))
    registered = folder.store(args.name, fitted.classifier, fitted.report, replace=args.replace)
    file = args.out / f"{args.name}.json"
    emit(
        args.json,
        {"name": args.name, "version": registered.version, "file": str(file), "report": asdict(fitted.report)},
        _show,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    options = parser("fit", "Fit a classifier to a folder of pictures for each class.")
    options.add_argument("name", help="of the classifier: a-z, 0-9, '.', '_' and '-'")
    options.add_argument("--bundle", required=True, help="embeds the pictures; the classifier belongs to its family")
    options.add_argument(
        "--method", required=True, help="a head that can be fitted; 'calmclip plugins heads' lists all"
    )
    options.add_argument("--pictures", type=Path, metavar="DIR", help="a folder of pictures for each class")
    options.add_argument(
        "--label", action="append", default=[], help="may be given many times; default: the folders, by name"
    )
    options.add_argument("--template", action="append", default=[], help="a sentence with {}; default: the bundle's")
    options.add_argument(
        "--captions", type=Path, metavar="FILE", help="JSON, picture -> its captions, for a method that reads them"
    )
    options.add_argument(
        "--validation", type=Path, metavar="DIR", help="as --pictures: chooses the params and measures the accuracy"
    )
    options.add_argument("--unlabelled", type=Path, metavar="DIR", help="pictures, for a method that reads them")
    options.add_argument("--words", type=Path, metavar="FILE", help="a word a line, for a method that explains itself")
    options.add_argument(
        "--param", action="append", default=[], metavar="KEY=VALUE", help="of the method; a value may be JSON"
    )
    options.add_argument(
        "--augment", type=int, nargs="?", const=CROPS, default=0, metavar="N",
        help=f"also use N random crops of each picture (without a number {CROPS})",
    )  # fmt: skip
    options.add_argument(
        "--out", type=Path, default=CLASSIFIERS, metavar="DIR", help=f"folder of classifiers, default {CLASSIFIERS}"
    )
    options.add_argument("--replace", action="store_true", help="replace a classifier of this name")
    bundle_options(options)
    return options


def _labelled(
    classes: Mapping[str, Sequence[Path]], labels: Sequence[str], folder: Path
) -> tuple[list[Path], list[int]]:
    """The pictures, and the index of the label of each. Raises `BadRequest` for a folder that is no label."""
    if unknown := [name for name in classes if name not in labels]:
        raise BadRequest(
            f"{folder / unknown[0]} is a folder of none of the {len(labels)} labels; expected {', '.join(labels[:5])}"
            f"{', …' if len(labels) > 5 else ''}"
        )
    pairs = [(path, labels.index(name)) for name, paths in classes.items() for path in paths]
    return [path for path, _ in pairs], [index for _, index in pairs]


def _captions(file: Path, folder: Path, pictures: Sequence[Path]) -> list[str]:
    """The first caption of each picture, which the file names by its path in ``folder``. Raises `BadRequest`."""
    from calmclip.models.datasets import read_captions

    captions = read_captions(file)
    names = [path.relative_to(folder).as_posix() for path in pictures]
    if lacking := [name for name in names if name not in captions]:
        raise BadRequest(
            f"{file} has no caption of {lacking[0]}, nor of {len(lacking) - 1} others; expected one for each picture, "
            f"by its path in {folder}"
        )
    return [captions[name][0] for name in names]


def _named(flow: "Flow[Array]", path: object) -> "Flow[Array]":
    """``flow``, whose errors name the picture."""
    try:
        return (yield from flow)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _show(value: dict[str, Any]) -> None:
    report = value["report"]
    print(f"{value['name']}: {report['method']} of {report['pictures']} pictures, {report['labels']} labels")
    if report["after"] is not None:
        print(f"accuracy  zero-shot {report['before']:.3f}, fitted {report['after']:.3f} ({report['measured']})")
    else:
        print(f"accuracy  {report['measured']}")
    print(f"params    {', '.join(f'{key} {number}' for key, number in report['params'].items()) or 'none'}")
    print(f"seconds   {report['seconds']:.3f}, without the pictures")
    for note in report["notes"]:
        print(f"note      {note}")
    print(f"written   {value['file']}, version {value['version']}")
