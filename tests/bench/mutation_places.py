"""Places where a fault can be put into our code, drawn by seed; Cosmic Ray's operators make the fault.

Left out: annotations, * and / of signatures, arguments of log calls, code under `TYPE_CHECKING` or `__name__`, faults
that do not compile, and the operators in LEFT_OUT. Cosmic Ray has no operator on strings, so docstrings and other texts
stay as they are.
"""

import ast
import difflib
import hashlib
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

PACKAGES = ("models", "service", "export")
GENERATED = ("models/bundles", "models/ops/lib")
LEFT_OUT = {
    "VariableReplacer": "needs names as arguments, and draws numbers without a seed",
    "VariableInserter": "the same",
    "ReplaceComparisonOperator_Eq_Is": "between constants, identity is CPython's affair",
    "ReplaceComparisonOperator_NotEq_IsNot": "the same",
}
LOGGERS = ("log", "logger", "logging")


@dataclass(frozen=True)
class Place:
    """One fault. ``id`` depends on the fault's text and its function, not on line numbers."""

    id: str
    file: str
    where: str  # the function or class around it
    line: int
    operator: str
    occurrence: int  # among the places of ``operator`` in the file
    before: str
    after: str

    def source(self, root: Path) -> str:
        """The file's text with the fault."""
        return _faulty((root / self.file).read_text(), self.operator, self.occurrence)


def files(root: Path, package: str) -> dict[str, int]:
    """Source file -> its lines of code, without empty lines and comments."""
    counts = {}
    for path in sorted((root / package).rglob("*.py")):
        name = str(path.relative_to(root))
        if not name.startswith(GENERATED):
            lines = (line.strip() for line in path.read_text().splitlines())
            counts[name] = sum(bool(line) and not line.startswith("#") for line in lines)
    return {name: count for name, count in counts.items() if count}


def draw(root: Path, seed: int, count: int) -> list[Place]:
    """``count`` faults. A package and a file get faults by their lines of code, and each kind of operator the same
    number of times, as far as a package has places for it.

    Every choice hashes the text it is about, so most faults of a seed outlive changes elsewhere in the tree.
    """
    sizes = {package: files(root, package) for package in PACKAGES}
    drawn: dict[str, Place] = {}
    for package, share in _shares({package: sum(sizes[package].values()) for package in PACKAGES}, count).items():
        kinds = sorted(_operators(), key=lambda kind: _chance(seed, package, kind))
        candidates = (_fault(root, sizes[package], kind, f"{seed} {turn}") for turn, kind in _turns(kinds))
        wanted = len(drawn) + share
        while len(drawn) < wanted:
            if place := next(candidates):
                drawn[place.id] = place
    return list(drawn.values())


def _turns(kinds: list[str]) -> Iterator[tuple[int, str]]:
    """Round after round of ``kinds``, with the round's number."""
    return ((turn, kind) for turn in range(1000) for kind in kinds)


def _chance(*words: object) -> float:
    """A number in (0, 1] that is drawn by ``words``."""
    digest = hashlib.sha256("\n".join(map(str, words)).encode()).digest()
    return (int.from_bytes(digest[:8]) + 1) / 2**64


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Name -> its share of ``count``, by largest remainders."""
    exact = {name: count * size / sum(sizes.values()) for name, size in sizes.items()}
    whole = {name: int(share) for name, share in exact.items()}
    for name in sorted(sizes, key=lambda name: whole[name] - exact[name])[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


@cache
def _operators() -> dict[str, list[str]]:
    """Kind -> operators: ReplaceBinaryOperator -> ReplaceBinaryOperator_Add_Sub, …"""
    kinds = defaultdict(list)
    for name in operator_names():
        short = name.rpartition("/")[2]
        if short not in LEFT_OUT:
            kinds[short.split("_")[0]].append(name)
    return kinds


def _fault(root: Path, sizes: dict[str, int], kind: str, turn: str) -> Place | None:
    """A fault of this kind in a file drawn by its size, or None if no file has a place for it."""
    # The smallest of exponential variables of rate `size` is at a file with the chance size / sum of sizes.
    for name in sorted(sizes, key=lambda name: -math.log(_chance(turn, kind, name)) / sizes[name]):
        text = (root / name).read_text()
        for occurrence in sorted(_occurrences(text, kind), key=lambda occurrence: _chance(turn, *occurrence.key)):
            if place := _place(name, text, occurrence):
                return place
    return None


@dataclass(frozen=True)
class _Occurrence:
    operator: str
    number: int  # in the order in which `mutate_code` counts
    key: tuple[str, str, int, int]  # operator, the line's text, column, number among equal ones


def _occurrences(text: str, kind: str) -> Iterator[_Occurrence]:
    """The places that the rules allow."""
    nodes, lines = list(ast_nodes(get_ast(text))), text.splitlines()
    for name in _operators()[kind]:
        operator, number, equal = get_operator(name)(), 0, Counter[tuple[str, int]]()
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                where = lines[line - 1].strip(), column
                equal[where] += 1
                if not _left_out(node):
                    yield _Occurrence(name, number, (name, *where, equal[where]))
                number += 1


def _left_out(node: Any) -> bool:
    """An annotation, a signature's * and /, a log call's argument, or code that a program does not run."""
    child, parent = node, node.parent
    if node.type == "operator" and parent.type in ("parameters", "lambdef"):
        return True
    while parent is not None:
        match parent.type:
            case "tfpdef" if child is parent.children[2]:
                return True
            case "annassign" if child is parent.children[1]:
                return True
            case "funcdef" if child is parent.annotation:
                return True
            case "atom_expr" | "power" if child.type == "trailer" and parent.children[0].get_code().strip() in LOGGERS:
                return True
            case "if_stmt" if any(word in parent.children[1].get_code() for word in ("TYPE_CHECKING", "__name__")):
                return True
        child, parent = parent, parent.parent
    return False


def _faulty(text: str, operator: str, occurrence: int) -> str:
    return str(mutate_code(text, get_operator(operator)(), occurrence))


def _place(name: str, text: str, occurrence: _Occurrence) -> Place | None:
    """None if the fault does not compile or leaves the program as it is."""
    faulty = _faulty(text, occurrence.operator, occurrence.number)
    try:
        with warnings.catch_warnings(action="ignore"):
            if ast.dump(ast.parse(faulty)) == ast.dump(ast.parse(text)):
                return None
            compile(faulty, name, "exec")
    except SyntaxError:
        return None
    old, new = text.splitlines(), faulty.splitlines()
    _, start, end, new_start, new_end = next(
        code for code in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if code[0] != "equal"
    )
    start = next(number for number in range(start, end) if old[number].strip())  # a decorator takes empty lines along
    before, after = (" ".join(" ".join(lines).split()) for lines in (old[start:end], new[new_start:new_end]))
    tree = ast.parse(text)
    where = _where(tree, start + 1)
    equal = [n for n in range(start) if old[n].strip() == old[start].strip() and _where(tree, n + 1) == where]
    words = [name, where, before, after, *([str(len(equal))] if equal else [])]
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    operator = occurrence.operator
    return Place(key, name, where, start + 1, operator, occurrence.number, before, after or "(nothing)")


def _where(tree: ast.AST, line: int) -> str:
    return ".".join(node.name for node in _around(tree, line)) or "the module"


def _around(tree: ast.AST, line: int) -> list[Any]:
    """Classes and functions that hold ``line``, outermost first; decorators and signatures belong to them."""
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, named) and line in _span(node)]


def reaching_lines(text: str, line: int) -> list[Sequence[int]]:
    """Sets of lines, the best first: a test that executes a line of a set can notice a fault in ``line``.

    In a function's body that is the statement. A signature is executed at import, but its effect shows in the body;
    the effect of code of a module or a class shows in the module's functions, if it has any.
    """
    tree = ast.parse(text)
    functions = [node for node in _around(tree, line) if not isinstance(node, ast.ClassDef)]
    if functions:
        body = functions[-1].body
        return [_body(functions[-1]) if line < body[0].lineno else _statement(functions[-1], line)]
    defined = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [[number for node in defined for number in _body(node)], _statement(tree, line)]


def _body(function: Any) -> range:
    return range(function.body[0].lineno, function.end_lineno + 1)


def _statement(tree: ast.AST, line: int) -> range:
    """The lines of the smallest statement around ``line``, without the statements inside it."""
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and line in _span(node)]
    lines = _head(min(around, key=lambda node: len(_span(node))))
    return lines if line in lines else range(line, line + 1)  # such as `except`


def _span(node: Any) -> range:
    return range(
        min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]), node.end_lineno + 1
    )


def _head(node: Any) -> range:
    span = _span(node)
    return range(span.start, max(span.start + 1, node.body[0].lineno)) if hasattr(node, "body") else span
