"""`calmclip serve` in a separate process, as a user starts it; free ports; installed programs."""

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
    """The path of ``program``. Without it the test is skipped, in CI it fails; ``without`` says what is not tested."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{program} is not installed: {without}")
    return path


@contextmanager
def serving(
    bundles: Path, data: Path, *flags: str, cwd: Path | None = None, **more: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client, Path]]:
    """The process, a client for it, and its log file: an unread pipe would fill up and then block the server.
    ``more``: environment variables."""
    port = free_port()
    command = [sys.executable, "-m", "calmclip.models.cli", "serve", "--bundles", str(bundles), "--port", str(port)]
    all_hits = {"CALMCLIP_MIN_RELEVANCE": "0"}  # when hits are measured is not known, and tiny nets mean nothing
    environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data), **all_hits, **more}
    data.mkdir(exist_ok=True)
    log = data / "log"
    process = subprocess.Popen([*command, *flags], env=environment, stderr=log.open("w"), cwd=cwd)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()
                with suppress(httpx.TransportError):
                    answer = client.get("/readyz")
                    if answer.status_code == 200 and "is being opened" not in answer.text:
                        break
                time.sleep(0.05)
            else:
                pytest.fail("the service was not ready after a minute")
            yield process, client, log
        finally:
            process.kill()
            process.wait()
