"""`calmclip serve` as a person starts it: a process of its own; ports and programs of this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def installed(program: str, without: str) -> str:
    """Its path. Where it is not installed, the test is skipped with what is left ``without`` it; in CI it fails."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{program} is not installed: {without}")
    return found


@contextmanager
def serving(
    bundles: Path, data: Path, *flags: str, cwd: Path | None = None, **more: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client, Path]]:
    """The process, a client for it, and the file its log goes to: a pipe that nobody reads is full at some time, and
    then the server waits. ``more``: environment variables."""
    port = free_port()
    command = [sys.executable, "-m", "calmclip.models.cli", "serve", "--bundles", str(bundles), "--port", str(port)]
    environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data), **more}
    data.mkdir(exist_ok=True)
    log = data / "log"
    process = subprocess.Popen([*command, *flags], env=environment, stderr=log.open("w"), cwd=cwd)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.05)
            else:
                pytest.fail("the service was not ready after a minute")
            yield process, client, log
        finally:
            process.kill()
            process.wait()
