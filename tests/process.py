"""`calmclip serve` as a person starts it: a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx


@contextmanager
def serving(
    bundles: Path, data: Path, *flags: str, cwd: Path | None = None, **more: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client, Path]]:
    """The process, a client for it, and the file its log goes to. ``more``: environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "calmclip.models.cli",
        "serve",
        "--bundles",
        str(bundles),
        "--port",
        str(port),
        *flags,
    ]
    environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data), **more}
    data.mkdir(exist_ok=True)
    log = data / "log"
    process = subprocess.Popen(command, env=environment, stderr=log.open("w"), cwd=cwd)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        try:
            for _ in range(400):
                assert process.poll() is None, log.read_text()
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.05)
            yield process, client, log
        finally:
            process.kill()
            process.wait()
