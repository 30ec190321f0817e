"""`calmclip completion`: the scripts are run in the shells themselves."""

import argparse
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from calmclip.models.cli import VERBS, main, parser_of
from tests.process import installed

# what is typed before a Tab -> what the shell may write. Of each kind: a verb, a verb's verb, a flag, a choice
TYPED = {
    "calmclip co": {"collection", "completion"},
    "calmclip collection re": {"re-embed", "remove"},
    "calmclip index --pru": {"--prune"},
    "calmclip keys add --scope m": {"metrics"},
    "calmclip collection items --lim": {"--limit"},
}


@pytest.fixture
def script(tmp_path, capsys):
    """A function: shell -> the file with its script."""

    def write(shell: str) -> Path:
        assert main(["completion", shell]) == 0
        file = tmp_path / f"calmclip.{shell}"
        file.write_text(capsys.readouterr().out)
        return file

    return write


def output(*command: str, cwd: Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, timeout=60).stdout.split("\n")


def test_bash_completes(script, tmp_path):
    installed("bash", "completion in bash")
    (tmp_path / "dunes.jpg").touch()
    file = script("bash")
    for line, wanted in {**TYPED, "calmclip run mini-int8 classify dun": {"dunes.jpg"}}.items():
        words = line.split()
        code = f"""
            source {file}
            COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
            run=$(complete -p calmclip | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            $run calmclip {words[-1]} {words[-2]}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        assert {*output("bash", "--norc", "-c", code, cwd=tmp_path)} - {""} == wanted, line


@pytest.mark.slow
def test_fish_completes(script, tmp_path):
    installed("fish", "completion in fish")
    file = script("fish")
    for line, wanted in TYPED.items():
        lines = output("fish", "--no-config", "-c", f"source {file}; complete -C '{line}'", cwd=tmp_path)
        assert {each.partition("\t")[0] for each in lines} - {""} == wanted, line


@pytest.mark.slow
def test_zsh_completes(script, tmp_path):
    """zsh completes only on a terminal: a Tab writes the rest of a word, and lists several."""
    zsh = installed("zsh", "completion in zsh")
    file = script("zsh")
    file.rename(tmp_path / "_calmclip")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(zsh, ["zsh", "-f"], {"TERM": "dumb", "PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    try:
        _typed(
            terminal,
            f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u; PS1='%% '; unsetopt zle_bracketed_paste\n",
        )
        for line, wanted in TYPED.items():
            seen = _typed(terminal, f"{line}\t\t")
            assert all(re.search(rf"{re.escape(word)}\b", seen) for word in wanted), (line, seen)
            _typed(terminal, "\x15")  # delete the line
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _typed(terminal: int, text: str) -> str:
    """What the terminal shows after ``text``, until it is silent."""
    os.write(terminal, text.encode())
    seen, quiet = b"", time.monotonic() + 10
    while time.monotonic() < quiet:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)
            quiet = time.monotonic() + 1
    return seen.decode(errors="replace")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_has_every_verb_and_flag(script, shell):
    text = script(shell).read_text()
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", text), verb
        for action in parser_of(verb)._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert all(re.search(rf"\b{name}\b", text) for name in action.choices), verb
            for option in action.option_strings:
                assert option.lstrip("-") in text, (verb, option)


def test_an_unknown_shell_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as usage:
        main(["completion", "tcl"])
    assert usage.value.code == 2
