"""`calmclip eval`: the size of a run, which params win, and a run that Ctrl-C ends. The eval is invented."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calmclip.models.cli import main
from calmclip.models.evals import EVALS
from calmclip.models.evals.samples import Samples, write

TOY = '''
"""Texts that are long. It writes the samples of the second bundle so slowly that a test can stop it there."""
import time
import numpy as np
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.evals import EVALS, Eval, Figure, Samples
from calmclip.models.evals.progress import progress

class Params(FrozenModel):
    least: int = 3
    slow: bool = False

class Slow:
    """An array that takes a minute to write."""
    dtype, shape = np.dtype(bool), (4,)
    def __array__(self, *_, **__):
        print("writing", flush=True)
        time.sleep(60)

def read(directory, params, limit):
    return tuple((directory / "texts.txt").read_text().split()[:limit])

def predict(runner, texts, params):
    hit = np.array([len(text) >= params.least for text in progress(texts, "long texts", "text")])
    second = Slow() if params.slow and runner.bundle.name == "b" else hit
    return Samples({"texts": len(texts)}, {"hit": hit, "second": second})

def score(samples, params):
    hit = samples.arrays["hit"]
    return lambda rows: [Figure("long", int(hit[rows].sum())), Figure("least", params.least)]

EVALS.register("toy")(Eval("embed", "texts.txt", Params, read, predict, score, limit=2, full={"least": 5}))
'''
PROGRAM = TOY + "\nimport sys\nfrom calmclip.models.cli import main\nsys.exit(main(sys.argv[1:]))\n"


@pytest.fixture
def argv(tmp_path: Path, sealed: Path) -> list[str]:
    """The command over four texts, with 1, 3, 4 and 6 letters, and two bundles, a and b."""
    (tmp_path / "texts.txt").write_text("a bee seal salmon")
    made = json.loads((sealed / "bundle.json").read_text())
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in sealed.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "bundle.json").write_text(json.dumps(made | {"name": name}))
    options = ["--resamples", "10", "--json", "--save", str(tmp_path / "saved")]
    return ["eval", str(tmp_path / "a"), "toy", "--data", str(tmp_path), "--against", str(tmp_path / "b"), *options]


@pytest.mark.parametrize(
    ("options", "texts", "long", "least"),
    [
        ([], 2, 1, 3),
        (["--limit", "3"], 3, 2, 3),
        (["--full"], 4, 1, 5),
        (["--full", "--limit", "3"], 3, 0, 5),
        (["--full", "--param", "least=4"], 4, 2, 4),
        (["--param", "least=1"], 2, 2, 1),
    ],
)
def test_the_size_of_a_run(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], texts: int, long: int, least: int,
):  # fmt: skip
    EVALS.load()
    for part in ("_plugins", "_homes"):
        monkeypatch.setattr(EVALS, part, dict(getattr(EVALS, part)))
    exec(compile(TOY, "toy.py", "exec"), {"__name__": __name__})
    assert main([*argv, *options]) == 0
    shown = capsys.readouterr()
    table = json.loads(shown.out)
    figures = {figure["name"]: figure["values"]["a"]["value"] for figure in table["figures"]}
    assert (table["counts"], figures) == ({"texts": texts}, {"long": long, "least": least})
    assert "long texts" not in shown.err  # a bar is for a terminal


def test_control_c_leaves_whole_files_alone(argv: list[str], tmp_path: Path):
    """It comes while the samples of the second bundle are written; the errors go to a terminal, which has a bar."""
    read_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))  # a bar has the terminal's width
    command = [sys.executable, "-c", PROGRAM, *argv, "--param", "slow=true", "--html", str(tmp_path / "page.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert [path.suffix for path in sorted((tmp_path / "saved").iterdir())] == [".part", ".npz"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stdout.read() == b""
    errors = os.read(read_end, 1 << 16).decode()
    os.close(read_end)
    assert "long texts" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["a.toy.npz"]
    assert Samples.load(tmp_path / "saved" / "a.toy.npz", "toy").arrays["hit"].tolist() == [False, True]
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_is_whole_or_as_before(tmp_path: Path, error: type[BaseException]):
    file, content = tmp_path / "new" / "a.npz", np.arange(9).tobytes()

    def half(out: Callable[..., object]) -> None:
        out.write(content[:20])  # type: ignore[attr-defined]
        raise error

    write(file, lambda out: out.write(content))
    with pytest.raises(error):
        write(file, half)
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("a.npz", content)]
