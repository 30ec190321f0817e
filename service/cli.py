"""The verbs `serve`, `index`, `collection` and `keys`. What a verb needs beyond its flags is imported after them."""

import argparse
import ctypes
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from calmclip.models.cli import emit, parser
from calmclip.models.errors import BadRequest, BundleNotFound, CalmclipError, ExtraMissing
from calmclip.models.preprocess.truncation import METHODS

M_ARENA_MAX = -8  # of malloc.h


def serve_command(argv: list[str]) -> int:
    """`calmclip serve`: answer over HTTP until SIGTERM or Ctrl-C; requests in flight are finished first.

    Flags override the environment (CALMCLIP_…), which overrides the defaults.
    """
    _few_heaps()
    _one_blas_thread()
    options = parser("serve", "Answer over HTTP.")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts connections from other machines")
    options.add_argument("--port", type=int, default=8080)
    _common(options)
    options.add_argument("--load", help="comma-separated bundles; the first that serves a task is its default")
    given = options.parse_args(argv)
    from calmclip.service.logs import log, log_process

    in_json = given.json or _log_of_the_environment() == "json"
    log_process("json" if in_json else "text")  # now, as wrong settings are a line of the log too
    try:
        return _serve(given)
    except (CalmclipError, OSError) as error:
        if not in_json:
            raise
        log.critical("%s", error)
        return 3 if isinstance(error, ExtraMissing) else 2


def _serve(given: argparse.Namespace) -> int:
    import uvicorn

    from calmclip.models.bundle.store import find, names
    from calmclip.models.ops import library
    from calmclip.service.app import create_app
    from calmclip.service.probes import Probes
    from calmclip.service.server import Protocol, Server
    from calmclip.service.settings import from_environment

    settings = from_environment(
        bundles_dir=given.bundles, threads=given.threads, load=given.load, log="json" if given.json else None
    )
    library.find(settings.ops)  # raises if it is required and missing, before every bundle does
    for name in settings.load:
        find(name, settings.bundles_dir)
    if not names(settings.bundles_dir) and not settings.load:
        raise BundleNotFound(f"there is no bundle in {settings.bundles_dir}; 'calmclip export mini' makes one")

    ports = {"CALMCLIP_METRICS_PORT": settings.metrics_port, "CALMCLIP_PROBES_PORT": settings.probes_port}
    _check_distinct({"the service": given.port, **ports})
    app = create_app(settings)
    sockets = [_listen(given.host, port) for port in (given.port, settings.metrics_port) if port is not None]
    probes = Probes(app.state.service, _listen(given.host, settings.probes_port)) if settings.probes_port else None
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # the middleware writes one with request ids and stages
        server_header=False,
        http=Protocol,
        ws="none",
        proxy_headers=False,  # no code reads the client's address or scheme
        timeout_graceful_shutdown=int(settings.deadline_ms / 1000) + 1,
    )
    # uvicorn raises the signal again at the end, which must not kill the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if probes:
        probes.start()
    server = Server(config, app.state.service, probes)
    server.run(sockets=sockets)
    return 0 if server.started else 1


def index_command(argv: list[str]) -> int:
    """`calmclip index DIR --collection NAME`: index a folder of pictures; exit 1 if none of them could be read."""
    options = parser("index", "Embed a folder of pictures into a collection. A second run resumes an interrupted one.")
    options.add_argument("folder", type=Path, metavar="DIR")
    options.add_argument("--collection", required=True)
    options.add_argument("--model", help="a bundle; default: the service's")
    target = options.add_mutually_exclusive_group()
    target.add_argument("--url", help="a running service, such as http://127.0.0.1:8080; default: the store itself")
    target.add_argument("--bundles", type=Path)
    options.add_argument("--threads", type=int)
    given = options.parse_args(argv)
    from calmclip.service.indexing import index
    from calmclip.service.settings import API_KEY, from_environment

    settings = from_environment(bundles_dir=given.bundles, threads=given.threads, deadline_ms=600_000)
    result = index(
        given.folder,
        given.collection,
        model=given.model,
        url=given.url,
        settings=None if given.url else settings,
        key=os.environ.get(API_KEY),
    )
    emit(given.json, result, _show)
    return 1 if result["broken"] and not (result["added"] or result["skipped"]) else 0


def collection_command(argv: list[str]) -> int:
    """`calmclip collection list|export|import|re-embed|remove`."""
    options = parser("collection", "The collections of a store, without a service.")
    options.add_argument("--store", help="KIND:LOCATION; default: CALMCLIP_STORE, else the data directory's")
    options.add_argument("--bundles", type=Path, help="directory of bundles; default: models/bundles")
    verbs = options.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="names, bundles, items, and which collections do not open")
    exporting = verbs.add_parser("export", help="write a Parquet file or a bank (.npz), also beside a service")
    exporting.add_argument("name")
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--replace", action="store_true", help="replace the file")
    importing = verbs.add_parser("import", help="read a file of `export`, or any bank, into the store")
    importing.add_argument("file", type=Path)
    importing.add_argument("--name", help="default: the name in the file; of a bank (.npz), the file's name")
    importing.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True,
        help="make unit vectors of a bank's others; --no-normalize refuses them",
    )  # fmt: skip
    importing.add_argument("--replace", action="store_true", help="replace the collection")
    embedding = verbs.add_parser("re-embed", help="give a collection the vectors of another bundle")
    embedding.add_argument("name")
    embedding.add_argument("--model", help="the bundle; default: the present one of the same name")
    embedding.add_argument("--folder", type=Path, help="the folder that was indexed, if no originals are kept")
    embedding.add_argument("--drop", action="store_true", help="leave out the items that have no source")
    embedding.add_argument("--dimensions", type=int, metavar="N", help="shorten the vectors, if the bundle allows it")
    embedding.add_argument("--truncate", choices=METHODS, help="of a text that is too long; default: the bundle's")
    embedding.add_argument("--threads", type=int, help="threads per graph; default: one per core")
    verbs.add_parser("remove", help="delete a collection and all its items, also a damaged one").add_argument("name")
    given = options.parse_args(argv)
    from calmclip.service import collection_cli
    from calmclip.service.settings import from_environment

    settings = from_environment(store=given.store, bundles_dir=given.bundles, threads=getattr(given, "threads", None))
    result = collection_cli.VERBS[given.verb](settings, given)
    emit(given.json, result, collection_cli.show)
    return 0


def keys_command(argv: list[str]) -> int:
    """`calmclip keys add|list|remove`: the file that CALMCLIP_KEYS names."""
    from calmclip.service import keys

    options = parser("keys", "The API keys of a service: a file of names, hashes and scopes.")
    options.add_argument(
        "--file", type=Path, default=os.environ.get(keys.VARIABLE) or None, help="default: CALMCLIP_KEYS"
    )
    verbs = options.add_subparsers(dest="verb", required=True)
    adding = verbs.add_parser("add", help="create a key and print it; it is not stored")
    adding.add_argument("name")
    adding.add_argument(
        "--scope", action="append", choices=keys.SCOPES, required=True,
        help="read (ask, search, list), write (change collections and classifiers), metrics; may be repeated",
    )  # fmt: skip
    verbs.add_parser("list", help="names and scopes")
    verbs.add_parser("remove", help="revoke a key at once").add_argument("name")
    given = options.parse_args(argv)
    if given.file is None:
        raise BadRequest("no file of keys is named; use --file or set CALMCLIP_KEYS")
    if given.verb == "add":
        secret = keys.add(given.file, given.name, given.scope)
        emit(given.json, {"name": given.name, "key": secret}, lambda value: print(value["key"]))
        return 0
    if given.verb == "remove":
        keys.remove(given.file, given.name)
    rows = [{"name": key.name, "scopes": list(key.scopes)} for key in keys.read(given.file)]
    emit(given.json, {"keys": rows}, _show_keys)
    return 0


def _one_blas_thread() -> None:
    """numpy's products, of fits, take one thread, because requests share the cores. OpenBLAS would start a thread for
    each core of the machine, whatever the container's share is, and they wait for each other in a loop."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it at its import


def _few_heaps() -> None:
    """Before threads start: let glibc use two heaps instead of one per thread. No effect with other C libraries.

    Measured with the built-in bundle after indexing 6 000 pictures: about 400 MB resident instead of 535.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _check_distinct(ports: dict[str, int | None]) -> None:
    """Raises `BadRequest`. ``ports``: what asks for a port -> the port, None for none."""
    users: dict[int, str] = {}
    for name, port in ports.items():
        if port is not None and (other := users.setdefault(port, name)) != name:
            raise BadRequest(f"{name} is {port}, which is also the port of {other}; choose another")


def _listen(host: str, port: int) -> socket.socket:
    """Raises `BadRequest`; uvicorn itself would exit with a status that has another meaning here."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise BadRequest(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from None
    # Accepted sockets inherit this. asyncio sets it only on sockets created with IPPROTO_TCP, which this one is not.
    # Without it an answer's body waits 40 ms until the client acknowledges its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _common(options: argparse.ArgumentParser) -> None:
    options.add_argument("--bundles", type=Path, help="directory of bundles; default: models/bundles")
    options.add_argument("--threads", type=int, help="threads per graph; default: one per core")


def _log_of_the_environment() -> str | None:
    """`Settings.log`, before the other settings are read; like them, in capitals or not."""
    return next((value for name, value in os.environ.items() if name.upper() == "CALMCLIP_LOG"), None)


def _show_keys(result: dict[str, Any]) -> None:
    for key in result["keys"]:
        print(f"{key['name']:24s} {' '.join(key['scopes'])}")


def _show(result: dict[str, object]) -> None:
    broken = result["broken"]
    assert isinstance(broken, list)
    for picture in broken:
        print(f"skipped {picture['id']}: {picture['why']}")
    print(
        f"{result['collection']} ({result['model']}): {result['added']} added, {result['skipped']} already present, "
        f"{len(broken)} broken; {result['items']} items, {result['seconds']} s"
    )
