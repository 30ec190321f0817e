"""Test files of a copy of this tree, each in a forked process: which lines they execute, and which test fails.

The parent imports the large libraries once and none of our modules, so a fork starts a file in milliseconds.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from compileall import compile_dir
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import coverage
import pytest

from tests.bench.mutation_places import PACKAGES

ROOT = Path(__file__).parents[2]
SKIPPED = (".venv", "build", "dist", "demonstration", "data", ".*_cache", "__pycache__", "*.egg-info")
LARGE = ("numpy", "PIL.Image", "onnx", "onnxruntime", "torch", "safetensors.torch", "pydantic", "fastapi.testclient")
OUR_PACKAGES = ("calmclip", "tests")
FAILED, ERROR = (re.compile(line, re.MULTILINE) for line in (r"^(?:FAILED|ERROR) (\S+)", r"^E +(\S.*)"))
# Servers that a test starts measure themselves too, unless the test kills them.
CONFIGURATION = """
[run]
source = {sources}
data_file = {data}/lines
parallel = true
patch = subprocess
sigterm = true
disable_warnings = no-data-collected, module-not-measured
"""


@dataclass
class Trace:
    """What one test file executes of a clean tree."""

    file: str
    digest: str  # of the test file
    seconds: float
    passed: bool
    lines: dict[str, list[int]] = field(default_factory=dict)  # source file -> executed lines
    sources: dict[str, str] = field(default_factory=dict)  # source file -> its digest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class Tree:
    """A copy of the working tree in ``folder``, in which the tests run; files of the working tree are never written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "tree"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=self._skipped)
        for package in PACKAGES:
            compile_dir(self.root / package, quiet=2)
        for name in LARGE:
            import_module(name)

    def _skipped(self, folder: str, names: list[str]) -> set[str]:
        # `data` and `build` are generated at the top alone
        patterns = SKIPPED if Path(folder) == ROOT else SKIPPED[-3:]
        return shutil.ignore_patterns(*patterns)(folder, names)

    def test_files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob("tests/**/test_*.py"))

    def trace(self, file: str) -> Trace:
        """Runs ``file`` under coverage. ``passed`` is false if a test fails or if none is collected."""
        data = self.folder / "trace"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        sources = ", ".join(str(self.root / package) for package in PACKAGES)
        (data / "configuration").write_text(CONFIGURATION.format(sources=sources, data=data))
        start = time.monotonic()
        status = self.run([file], limit=1200, measured=data / "configuration")
        seconds = round(time.monotonic() - start, 1)
        result = Trace(file, digest(self.root / file), seconds, status == 0, executed(data, self.root))
        result.sources = {name: digest(self.root / name) for name in result.lines}
        return result

    def run(self, files: Sequence[str], limit: float, measured: Path | None = None) -> int | None:
        """The exit status of pytest, or None after ``limit`` seconds. `failure` tells what failed."""
        child = os.fork()
        if not child:
            self._be_pytest(files, measured)
        end = time.monotonic() + limit
        try:
            while time.monotonic() < end:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.02)
            return None
        finally:
            with suppress(ProcessLookupError):  # the group holds what the tests started
                os.killpg(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)

    def failure(self) -> str:
        """The test that failed in the last run, and the first line of its error."""
        text = self.log.read_text(errors="replace")
        test, error = FAILED.search(text), ERROR.search(text)
        return f"{test[1] if test else 'the run itself'}: {error[1][:100] if error else text.strip()[-100:]}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def _be_pytest(self, files: Sequence[str], measured: Path | None) -> None:
        status = 70
        try:
            os.setsid()
            os.chdir(self.root)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            # Bytecode counts as fresh if its source's second and size are the same, as those of two faults can be.
            sys.dont_write_bytecode = True
            os.environ |= {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
            for name in [name for name in sys.modules if name.split(".")[0] in OUR_PACKAGES]:
                del sys.modules[name]
            sys.path[:] = [str(self.root), *(path for path in sys.path if path not in ("", str(ROOT)))]
            tracer = coverage.Coverage(config_file=str(measured)) if measured else None
            if tracer:
                tracer.start()
            options = ["-x", "-rfE", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
            status = int(pytest.main([*options, *files]))
            if tracer:
                tracer.stop()
                tracer.save()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def executed(data: Path, root: Path) -> dict[str, list[int]]:
    """Source file -> lines, over all processes that a test file started."""
    lines: defaultdict[str, set[int]] = defaultdict(set)
    for path in data.glob("lines.*"):
        stored = coverage.CoverageData(str(path))
        with suppress(coverage.exceptions.DataError):  # of a process that was killed while it wrote
            stored.read()
            for name in stored.measured_files():
                lines[str(Path(name).relative_to(root))].update(stored.lines(name) or ())
    return {name: sorted(numbers) for name, numbers in lines.items() if numbers}


def traces(tree: Tree, store: Path, files: Iterable[str]) -> dict[str, Trace]:
    """Test file -> what it executes. Traces of unchanged test files come from ``store``, a JSON lines file."""
    known = {}
    if store.exists():
        known = {trace.file: trace for trace in (Trace(**json.loads(line)) for line in store.open())}
    for file in files:
        if file not in known or known[file].digest != digest(tree.root / file):
            known[file] = tree.trace(file)
            with store.open("a") as lines:
                lines.write(json.dumps(asdict(known[file])) + "\n")
            print(
                f"{known[file].seconds:6.1f} s  {file}{'' if known[file].passed else '  fails without a fault'}",
                flush=True,
            )
    return known
