"""Instructions of the kernels' innermost loops, counted in the machine code: no processor is needed, nor asked.

    python -m tests.bench.ops_instructions [--machine aarch64] [--library FOLDER] [--all]

A row is the innermost loop of a kernel's code that computes most products in one pass: multiply-accumulates of bytes or
words, the instructions of a pass, how many of them multiply, load and store, and the least that the instruction set
needs for the products alone, if all else were free. Where a kernel has several such loops, as attention has, `--all`
shows every one that computes at least a quarter of the most. The library of another processor is cross-compiled.
"""

import argparse
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from calmclip.models.ops import build

OPS = ()  # every operator has a bench of its own
OF_WORDS = ("quant_conv_tiles",)  # kernels that multiply 16-bit words
WORDS = ("vpmaddwd", "vpdpwssd", "smlal", "smlal2")
KERNEL = re.compile(r"^INT8_KERNEL\((\w+), \w+\)", re.MULTILINE)
ADDRESS = r"[0-9a-f]+"
FUNCTION = re.compile(rf"^({ADDRESS}) <(.+)>:$")
INSTRUCTION = re.compile(rf"^\s*({ADDRESS}):\s+(?:\{{\w+\}} )?([a-z][\w.]*)\s*(.*)$")
TARGET = re.compile(rf"(?:^|[\s,])({ADDRESS}) <([^>+]+)(\+0x{ADDRESS})?>")
BRANCHES = re.compile(r"^(j[a-z]+|b\.[a-z]+|b|cbn?z|tbn?z)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    words: str

    @property
    def products(self) -> int:
        """Multiply-accumulates of integers: 8 or 16 bits each."""
        width = 64 if "zmm" in self.words else 32 if "ymm" in self.words else 16  # bytes of an x86-64 register
        match self.name:
            case "sdot" | "udot" | "usdot" | "sudot":
                return 16
            case "smmla" | "ummla" | "usmmla":
                return 32
            case "smlal" | "smlal2" | "umlal" | "umlal2" | "smull" | "smull2" | "umull" | "umull2":
                return 4 if ".4s" in self.words else 8 if ".8h" in self.words else 0
            case "vpdpbusd" | "vpdpbusds" | "vpmaddubsw":
                return width
            case "vpdpwssd" | "vpmaddwd":
                return width // 2
        return 0

    @property
    def moves(self) -> bool:
        """Whether it does nothing but read or write memory; operands in memory of x86-64 are free here."""
        if self.name.startswith(("ld", "st")):
            return True
        return self.name.startswith(("vmov", "mov", "vpbroadcast", "vbroadcast")) and "(" in self.words


@dataclass(frozen=True)
class Loop:
    body: tuple[Instruction, ...]

    @property
    def multiplying(self) -> tuple[Instruction, ...]:
        counted = tuple(instruction for instruction in self.body if instruction.products)
        pairs = [instruction for instruction in counted if instruction.name == "vpmaddubsw"]
        if pairs:  # what follows them only widens their sums
            return tuple(pairs)
        return counted

    @property
    def products(self) -> int:
        return sum(instruction.products for instruction in self.multiplying)

    @property
    def least(self) -> int:
        """The instructions that these products need by the densest instruction of this loop, sums included."""
        dense = max(self.multiplying, key=lambda instruction: instruction.products)
        each = {"vpmaddubsw": 3, "vpmaddwd": 2}.get(dense.name, 1)  # and the additions that make sums of 32 bits
        return -(-self.products // dense.products) * each


@dataclass(frozen=True)
class Code:
    """A library's functions, by address: kernel files have functions of the same names."""

    functions: dict[int, list[Instruction]]
    entries: dict[str, int]  # the name of a kernel's function -> its address
    files: dict[str, set[int]]  # a source file -> its functions that have no name for other files

    def around(self, address: int, isa: str) -> set[int]:
        """The functions of the file of this instruction set that has ``address``: the linker lays them side by side."""
        files = [file for name, file in self.files.items() if name.endswith(f"_{isa}.cc") and file]
        return min(files, key=lambda file: min(abs(other - address) for other in file))

    def reached(self, start: int) -> list[int]:
        """The functions whose addresses ``start`` names, and theirs."""
        known, waiting = [start], [start]
        while waiting:
            for instruction in self.functions[waiting.pop()]:
                target = TARGET.search(instruction.words)
                if target and (address := int(target[1], 16)) in self.functions and address not in known:
                    known.append(address)
                    waiting.append(address)
        return known


def code_of(library: Path, machine: str) -> Code:
    tool = "objdump" if machine == platform.machine() else f"{machine}-linux-gnu-objdump"
    if shutil.which(tool) is None:
        package = f"binutils-{machine.replace('_', '-')}-linux-gnu"
        raise SystemExit(f"{tool} is not installed; on Debian: apt install {package}")
    functions: dict[int, list[Instruction]] = {}
    entries: dict[str, int] = {}
    for line in _printed(tool, "-d", "--no-show-raw-insn", str(library)):
        if head := FUNCTION.match(line):
            entries[head[2]] = int(head[1], 16)
            current = functions.setdefault(entries[head[2]], [])
        elif part := INSTRUCTION.match(line):
            current.append(Instruction(int(part[1], 16), part[2], part[3]))
    files: dict[str, set[int]] = {}
    for line in _printed(tool, "-t", str(library)):
        if " df " in line:
            file = files.setdefault(line.split()[-1], set())
        elif files and " F .text" in line:
            file.add(int(line.split()[0], 16))
    return Code(functions, entries, files)


def _printed(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def loops(code: list[Instruction]) -> Iterator[Loop]:
    """The innermost loops: a branch back, with no other branch back in between."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    back = []
    for i, instruction in enumerate(code):
        target = TARGET.search(instruction.words) if BRANCHES.match(instruction.name) else None
        first = places.get(int(target[1], 16)) if target else None
        if first is not None and first <= i:
            back.append((first, i))
    for first, last in back:
        inside = [(a, b) for a, b in back if first <= a and b <= last and (a, b) != (first, last)]
        if not inside:
            yield Loop(tuple(code[first : last + 1]))


def kernel_loops(code: Code, kernel: str, isa: str) -> list[Loop]:
    """Those with products, the most first; of the same products, the shortest.

    A kernel that calls its loops through tables of pointers has those of its file.
    """
    start = code.entries[f"{kernel}_{isa}"]
    words = kernel in OF_WORDS
    return _most(code, code.reached(start), words) or _most(code, code.around(start, isa), words)


def _most(code: Code, functions: Iterable[int], words: bool) -> list[Loop]:
    wanted: dict[int, Loop] = {}
    for address in functions:
        for loop in loops(code.functions[address]):
            rival = wanted.get(loop.products)
            if words and not any(instruction.name in WORDS for instruction in loop.body):
                continue
            if loop.products and (rival is None or len(loop.body) < len(rival.body)):
                wanted[loop.products] = loop
    return [wanted[products] for products in sorted(wanted, reverse=True)]


def rows(library: Path, machine: str, *, every: bool = False) -> Iterator[str]:
    code = code_of(library, machine)
    kernels = KERNEL.findall((build.SOURCES / "kernels/list.inc").read_text(encoding="utf-8"))
    for kernel in kernels:
        for isa in build.isas("INT8_", machine):
            wanted = kernel_loops(code, kernel, isa)
            for loop in wanted if every else wanted[:1]:
                if 4 * loop.products < wanted[0].products:
                    continue
                multiply = sorted({instruction.name for instruction in loop.multiplying})
                count, moves = len(loop.body), sum(instruction.moves for instruction in loop.body)
                cells = (
                    kernel, isa, f"{loop.products:,}", count, f"{len(loop.multiplying)} {', '.join(multiply)}", moves,
                    loop.least, f"{loop.least / count:.0%}", f"{loop.products / count:.1f}",
                )  # fmt: skip
                yield f"| {' | '.join(map(str, cells))} |"


def table(library: Path, machine: str, *, every: bool = False) -> list[str]:
    head = ("kernel", "instruction set", "products", "instructions", "multiply", "load, store", "least", "of it",
            "products an instruction")  # fmt: skip
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows(library, machine, every=every)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--machine", default=platform.machine(), choices=("x86_64", "aarch64"))
    options.add_argument("--library", type=Path, help="the folder of a compiled library; it is compiled if not given")
    options.add_argument("--all", action="store_true", help="every loop with a quarter of the most products")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.library or Path(scratch)
        if arguments.library is None:
            build.build(folder, machine=arguments.machine)
        print(*table(folder / build.NAME, arguments.machine, every=arguments.all), sep="\n")


if __name__ == "__main__":
    main()
