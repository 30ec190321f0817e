"""The verb `ops`: build | info | check."""

import argparse
import sys
from typing import Any

from calmclip.models.cli import emit, parser
from calmclip.models.errors import OpsNotBuilt
from calmclip.models.ops import build, library, spec
from calmclip.models.ops.library import Library


def ops_command(argv: list[str]) -> int:
    """`calmclip ops build|info|check`: compile the library; which kernels run here; compare with the oracle."""
    options = parser("ops", "The compiled op library: softmax, soft-NMS and image preprocessing.")
    options.add_argument("do", choices=("build", "info", "check"))
    options.add_argument(
        "--if-possible",
        action="store_true",
        help="build: where that cannot be done, for want of a compiler, headers or else, say so in a line and exit 0",
    )
    given = options.parse_args(argv)
    return {"build": _build, "info": _info, "check": _check}[given.do](given)


def _build(given: argparse.Namespace) -> int:
    """Does nothing where the library is of these sources already."""
    found = library.look(build.FOLDER)
    done = not isinstance(found, Library)
    try:
        if done:
            build.build(build.FOLDER)
            library.look.cache_clear()
            found = library.look(build.FOLDER)
        if not isinstance(found, Library):
            raise OpsNotBuilt(f"what was built cannot be used: {found}")
    except (OpsNotBuilt, OSError) as error:  # OSError: the package's folder is not ours to write to, or full
        if not given.if_possible:
            raise
        reason = str(error).splitlines()
        print(f"calmclip: no op library ({reason[0]}); bundles run their own functions instead", file=sys.stderr)
        print(*reason[1:20], sep="\n", end="\n" if reason[1:] else "", file=sys.stderr)
        return 0
    value = {"library": str(found.path), "sha256": found.sha256, "built": done}
    emit(given.json, value, lambda v: print(f"{v['library']} {'built' if v['built'] else 'is up to date'}"))
    return 0


def _info(given: argparse.Namespace) -> int:
    """Also without a library: what the operators are, and why there is none."""
    found = library.find()
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in found.kernels if found else ():
        kernels.setdefault(kernel.name, []).append({"isa": kernel.isa, "runs": kernel.runs})
    value = {
        "domain": spec.DOMAIN,
        "version": spec.VERSION,
        "library": {"path": str(found.path), "sha256": found.sha256, **found.about} if found else None,
        "why_not": library.why_not(),
        "ops": {op.name: {"inputs": list(op.inputs), "attributes": op.attributes} for op in spec.OPS},
        "kernels": {
            name: {"isas": isas, "used": found.isas[name] if found else None} for name, isas in kernels.items()
        },
    }
    emit(given.json, value, _show)
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
        isas = ", ".join(one["isa"] + ("" if one["runs"] else " (not on this processor)") for one in kernel["isas"])
        print(f"  {name:24s} {kernel['used']:8s} of {isas}")


def _check(given: argparse.Namespace) -> int:
    """Exit 1 where an operator differs from its oracle, or there is no library."""
    from calmclip.models.ops.check import as_json, check

    results = [as_json(result) for result in check()]
    passed = all(result["passed"] for result in results)
    emit(given.json, {"passed": passed, "results": results}, _show_check)
    return 0 if passed else 1


def _show_check(value: dict[str, Any]) -> None:
    for result in value["results"]:
        said = result["trouble"] or f"{result['rounds']} inputs, at most {result['difference']:.1e} from the oracle"
        print(f"{'ok  ' if result['passed'] else 'FAIL'} {result['probe']:26s} {result['way']:9s} {said}")
