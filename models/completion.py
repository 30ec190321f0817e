"""The verb completion: a script that completes verbs, flags, choices and files in bash, zsh or fish.

The script is written by shtab (Apache-2.0) from the parsers that the verbs themselves use, and it starts no Python: a
Tab answers at once. Print it again after an update.
"""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from calmclip.models.cli import VERBS, emit, parser, parser_of
from calmclip.models.extras import extra_of, missing

SHELLS = ("bash", "zsh", "fish")
WRITER = "shtab"  # of the extra `completion`


def completion_command(argv: list[str]) -> int:
    """`calmclip completion SHELL`: print the script."""
    options = parser("completion", "Print the completion script of a shell; docs/command-line.md says where it goes.")
    options.add_argument("shell", choices=SHELLS)
    given = options.parse_args(argv)
    try:
        shtab = import_module(WRITER)
    except ModuleNotFoundError as error:
        raise missing("calmclip completion", error.name or WRITER, "completion") from None

    script = shtab.complete(all_verbs(shtab.FILE), shell=given.shell)
    emit(given.json, {"shell": given.shell, "script": script}, lambda value: print(value["script"]))
    return 0


def all_verbs(file: Any) -> argparse.ArgumentParser:
    """One parser of every verb whose extra is installed. ``file``: shtab's mark of an argument that is a path."""
    root = argparse.ArgumentParser("calmclip", description="INT8 bundles of CLIP-family models")
    root.add_argument("--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(dest="verb")
    for verb, (_, does) in VERBS.items():
        try:
            options = parser_of(verb)
        except ModuleNotFoundError as error:
            if extra_of(error.name or "") is None:
                raise
            continue
        _mark(options, file)
        verbs.add_parser(verb, help=does, add_help=False)  # for its line in the list
        verbs._name_parser_map[verb] = options
    return root


def _mark(options: argparse.ArgumentParser, file: Any) -> None:
    """Mark every argument that is a path."""
    for action in options._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in {*action.choices.values()}:
                _mark(inner, file)
        elif (action.type is Path and action.choices is None) or action.nargs == argparse.REMAINDER:
            action.complete = file  # type: ignore[attr-defined]  # shtab reads it
