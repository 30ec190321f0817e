"""The verb `ops`: build | info | check."""

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import emit, parser
from calmclip.models.errors import OpsNotBuilt

if TYPE_CHECKING:
    from calmclip.models.ops.library import Library


def ops_command(argv: list[str]) -> int:
    """`calmclip ops build|info|check`: compile the library; which kernels run here; compare with the oracle."""
    options = parser("ops", "The compiled op library.")
    options.add_argument("do", choices=("build", "info", "check"))
    options.add_argument(
        "--if-possible",
        action="store_true",
        help="build: if the build fails, e.g. without a compiler or headers, print a line and exit 0",
    )
    arguments = options.parse_args(argv)
    return {"build": _build, "info": _info, "check": _check}[arguments.do](arguments)


def _build(arguments: argparse.Namespace) -> int:
    """Builds nothing if the library is up to date, and measures nothing if this processor is known."""
    from calmclip.models.ops import build, library
    from calmclip.models.ops.library import Library

    built = library.look(build.FOLDER)
    outdated = not isinstance(built, Library)
    try:
        if outdated:
            build.build(build.FOLDER)
            library.look.cache_clear()
            built = library.look(build.FOLDER)
        if not isinstance(built, Library):
            raise OpsNotBuilt(f"the new library cannot be used: {built}")
    except (OpsNotBuilt, OSError) as error:  # OSError: the package's folder is read-only, or the disk is full
        if not arguments.if_possible:
            raise
        reason = str(error).splitlines()
        print(f"calmclip: no op library ({reason[0]}); bundles run their own functions instead", file=sys.stderr)
        print(*reason[1:20], sep="\n", end="\n" if reason[1:] else "", file=sys.stderr)
        return 0
    value = {"library": str(built.path), "sha256": built.sha256, "built": outdated, "measured": _measure(built)}
    emit(arguments.json, value, lambda v: print(f"{v['library']} {'built' if v['built'] else 'is up to date'}"))
    return 0


def _measure(built: "Library") -> bool:
    """Let every operator and its function take turns, unless that is known; whether it is known now.

    Without it a table decides, so a failure is a warning.
    """
    from calmclip.models.ops import breakeven, trial

    if breakeven.read(built):
        return True
    try:
        trial.store(built)
    except Exception as error:  # a read-only folder, an operator that this ONNX Runtime does not run
        print(f"calmclip: the operators were not measured ({error}); a table says which are used", file=sys.stderr)
        return False
    return True


def _info(arguments: argparse.Namespace) -> int:
    """The operators and the kernels; without a library the operators and the reason."""
    from calmclip.models.ops import breakeven, library
    from calmclip.models.ops.spec import DOMAIN, VERSION
    from calmclip.models.ops.table import OPS

    installed = library.find()
    choices = breakeven.choices(installed) if installed else {}
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in installed.kernels if installed else ():
        kernels.setdefault(kernel.name, []).append({"isa": kernel.isa, "runs": kernel.runs})
    value = {
        "domain": DOMAIN,
        "version": VERSION,
        "library": {"path": str(installed.path), "sha256": installed.sha256, **installed.about} if installed else None,
        "why_not": library.why_not(),
        "ops": {
            op.name: {"inputs": list(op.inputs), "attributes": op.attributes}
            | (asdict(choices[op.name]) if installed else {})
            for op in OPS
        },
        "pictures": asdict(choices[breakeven.PICTURES]) if installed else None,
        "processor": breakeven.processor(installed) if installed else None,
        "measured": bool(installed and breakeven.read(installed)),
        "kernels": {
            name: {"isas": isas, "used": installed.isas[name] if installed else None} for name, isas in kernels.items()
        },
    }
    emit(arguments.json, value, _show)
    return 0


def _show(value: dict[str, Any]) -> None:
    print(f"{value['domain']} version {value['version']}")
    for name, op in value["ops"].items():
        attributes = ", ".join(f"{key} = {default}" for key, default in op["attributes"].items())
        print(f"  {name:16s} {', '.join(op['inputs'])}{'; ' + attributes if attributes else ''}")
    if value["library"] is None:
        print(f"{value['why_not']}: bundles run their own functions ('calmclip ops build' makes one)")
        return
    library = value["library"]
    print(f"{library['path']}  {library['sha256'][:12]}  {library['compiler']}  {library['built']}")
    for name, kernel in value["kernels"].items():
        isas = ", ".join(row["isa"] + ("" if row["runs"] else " (not on this processor)") for row in kernel["isas"])
        print(f"  {name:24s} {kernel['used']:8s} of {isas}")
    print(f"{value['processor']}: {_MEASURED[value['measured']]}")
    for name, choice in [*value["ops"].items(), ("pictures", value["pictures"])]:
        ratio = f", {choice['ratio']:.2f} times as fast as its function" if choice["ratio"] else ""
        print(f"  {name:24s} {'compiled' if choice['compiled'] else 'left':8s} {choice['why']}{ratio}")


_MEASURED = {
    True: "'calmclip ops build' measured which operators beat their functions",
    False: "not measured, so a table says which operators beat their functions ('calmclip ops build' measures)",
}


def _check(arguments: argparse.Namespace) -> int:
    """Exit 1 if an operator differs from its oracle, or there is no library."""
    from calmclip.models.ops.check import as_json, check

    results = [as_json(result) for result in check()]
    passed = all(result["passed"] for result in results)
    emit(arguments.json, {"passed": passed, "results": results}, _show_check)
    return 0 if passed else 1


def _show_check(value: dict[str, Any]) -> None:
    for result in value["results"]:
        text = result["trouble"] or f"{result['rounds']} inputs, at most {result['difference']:.1e} from the oracle"
        print(f"{'ok  ' if result['passed'] else 'FAIL'} {result['probe']:26s} {result['way']:9s} {text}")
