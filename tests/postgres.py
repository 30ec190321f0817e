"""A PostgreSQL with pgvector for the tests: a new cluster in a temporary folder, on a free port."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from tests.process import free_port


@dataclass
class Server:
    bin: Path
    folder: Path
    port: int
    _numbers: Iterator[int] = field(default_factory=count)
    secret: str = "hush-5up3r"  # the password of the user `keeper`; tests search logs and answers for it

    def start(self) -> None:
        # A server that is stopped at once loses what it acknowledged and did not write, with and without fsync; no test
        # stops the machine
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c shared_buffers=64MB -c fsync=off"
        self._ctl("start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def running(self) -> bool:
        return (self.folder / "data" / "postmaster.pid").exists()

    def stop(self, mode: str = "fast") -> None:
        self._ctl("stop", "-w", "-m", mode)

    def database(self) -> str:
        """The URL of a new database in which the user `keeper` may do what service/deploy/postgres.sh grants."""
        name = f"d{next(self._numbers)}"
        self.psql(f"CREATE DATABASE {name}")
        self.psql(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC; GRANT CONNECT ON DATABASE {name} TO keeper")
        self.psql("CREATE EXTENSION vector; CREATE SCHEMA keeper AUTHORIZATION keeper", name)
        self.psql(f'ALTER DATABASE {name} SET search_path = "$user", public, keeper')  # of tests that damage a table
        return self.url(name)

    def url(self, name: str, secret: str | None = None) -> str:
        return f"postgresql://keeper:{secret or self.secret}@127.0.0.1:{self.port}/{name}"

    def psql(self, statement: str, database: str = "postgres") -> str:
        return self.run("psql", "-AtX", "-d", database, "-v", "ON_ERROR_STOP=1", "-c", statement)

    def run(self, program: str, *options: str) -> str:
        """A client program of the server's version, as the superuser."""
        where = ["-h", str(self.folder), "-p", str(self.port), "-U", "owner"]
        return _run([str(self.bin / program), *where, *options])

    def _ctl(self, verb: str, *options: str) -> None:
        _run([str(self.bin / "pg_ctl"), verb, "-D", str(self.folder / "data"), *options])


def why_not() -> str | None:
    """The reason why the cluster cannot run here, or None."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed; pip install -e '.[postgres]'"
    if binaries() is None:
        return "PostgreSQL with pgvector is not installed; apt-get install postgresql-17 postgresql-17-pgvector"
    if os.getuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and the user postgres does not exist"
    return None


def binaries() -> Path | None:
    """The folder of programs of the newest version with pgvector, or None."""
    folders = [file.parents[1] / "bin" for file in Path("/usr/lib/postgresql").glob("*/lib/vector.so")]
    return max(folders, key=lambda path: int(path.parent.name), default=None)


def place() -> Path | None:
    """Memory, if there is enough of it for the cluster; else None, the folder for temporary files."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30 else None


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A running server in the new ``folder``, whose path must be short because it holds a socket."""
    bin_ = binaries()
    assert bin_, why_not()
    folder.mkdir()
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Server(bin_, folder, free_port())
    # TCP needs the password; the socket does not
    _run([str(bin_ / "initdb"), "-D", str(folder / "data"), "-U", "owner", "-E", "UTF8", "--locale=C.UTF-8",
          "--no-sync", "--auth-local=trust", "--auth-host=scram-sha-256"])  # fmt: skip
    server.start()
    try:
        server.psql(f"CREATE ROLE keeper LOGIN PASSWORD '{server.secret}'")
        yield server
    finally:
        server.stop("immediate")


def _run(command: list[str]) -> str:
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, **user, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd="/", timeout=60
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()
