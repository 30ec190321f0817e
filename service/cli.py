"""The verbs `serve`, `index`, `search`, `collection` and `keys`. What a verb needs beyond its flags is imported after
them."""

import argparse
import ctypes
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import bundles_option, emit, parser, positive, threads
from calmclip.models.errors import BadRequest, BundleNotFound, CalmclipError, ExtraMissing
from calmclip.models.preprocess.truncation import METHODS
from calmclip.service.scopes import SCOPES
from calmclip.service.scopes import VARIABLE as KEYS_VARIABLE

if TYPE_CHECKING:
    from calmclip.service.settings import Settings

M_ARENA_MAX = -8  # of malloc.h
THREADS = "threads per graph; default: CALMCLIP_THREADS, else one per core"
REASONS = 3  # pictures that are named for each reason


def serve_command(argv: list[str]) -> int:
    """`calmclip serve`: answer over HTTP until SIGTERM or Ctrl-C; requests in flight are finished first.

    Flags override the environment (CALMCLIP_…), which overrides the defaults.
    """
    _few_heaps()
    _one_blas_thread()
    options = parser("serve", "Answer over HTTP.")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts connections from other machines")
    options.add_argument("--port", type=int, default=8080)
    bundles_option(options)
    options.add_argument("--threads", type=threads, help=THREADS)
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
    options.add_argument("--prune", action="store_true", help="also remove the items whose file is gone from DIR")
    options.add_argument("--yes", action="store_true", help="with --prune: even if that removes every item")
    _target(options, store=False)
    options.add_argument("--threads", type=threads, help=THREADS)
    given = options.parse_args(argv)
    if given.yes and not given.prune:
        options.error("--yes belongs to --prune")
    from calmclip.service.indexing import index

    settings = _settings(given, deadline_ms=600_000)  # also with a service: a misspelt variable may be its key
    result = index(
        given.folder,
        given.collection,
        model=given.model,
        url=given.url,
        settings=None if given.url else settings,
        key=_api_key(),
        prune=given.prune,
        prune_all=given.yes,
    )
    emit(given.json, result, _show)
    return 1 if result["broken"] and not (result["added"] or result["skipped"]) else 0


def search_command(argv: list[str]) -> int:
    """`calmclip search COLLECTION [TEXT]`: the nearest items, best first."""
    options = parser("search", "The nearest items of a collection to texts, pictures and stored items, added up.")
    options.add_argument("collection")
    options.add_argument("text", nargs="*", help="what to look for; several are added up")
    options.add_argument("--image", type=Path, metavar="FILE", action="append", default=[], help="and this picture")
    options.add_argument("--id", action="append", default=[], help="and the picture or text of this item")
    options.add_argument("--without", metavar="TEXT", action="append", default=[], help="less of this")
    options.add_argument("--top-k", type=positive, default=10, metavar="N", help="hits at most; default: 10")
    options.add_argument("--filter", metavar="JSON", help='of the metadata, such as \'{"year": {"gte": 2020}}\'')
    options.add_argument(
        "--min-relevance", type=float, metavar="P", help="0 to 1; 0 shows every hit; default: the service's setting"
    )
    _target(options)
    options.add_argument("--threads", type=threads, help=THREADS)
    given = options.parse_intermixed_args(argv)
    _require_one_target(options, given)
    from calmclip.service import search_cli

    emit(given.json, search_cli.search(given, _settings(given, deadline_ms=600_000), _api_key()), search_cli.show)
    return 0


def collection_command(argv: list[str]) -> int:
    """`calmclip collection create|list|show|items|delete-items|export|import|re-embed|remove`."""
    options = parser("collection", "The collections of a store, or of a running service (--url).")
    verb = _verbs(options, _target)
    creating = verb("create", "a new collection for the vectors of a bundle; nothing changes if it exists")
    creating.add_argument("name")
    creating.add_argument("--model", help="a bundle; default: the first that embeds")
    creating.add_argument(
        "--keep-originals", action=argparse.BooleanOptionalAction, help="keep what is embedded; default: the setting"
    )
    creating.add_argument("--dimensions", type=positive, metavar="N", help="shorten the vectors, if the bundle allows")
    verb("list", "names, bundles, items, and which collections do not open")
    verb("show", "a collection: its bundle, size and age").add_argument("name")
    listing = verb("items", "ids and titles, ordered by id")
    listing.add_argument("name")
    listing.add_argument("--after", metavar="ID", help="the last id of the previous page")
    listing.add_argument("--limit", type=positive, default=100, metavar="N", help="default: 100")
    deleting = verb("delete-items", "remove items; ids that do not exist are ignored")
    deleting.add_argument("name")
    deleting.add_argument("ids", nargs="+", metavar="ID")
    exporting = verb("export", "write a Parquet file or a bank (.npz), also beside a service")
    exporting.add_argument("name")
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--replace", action="store_true", help="replace the file")
    importing = verb("import", "read a file of `export`, or any bank, into the store")
    importing.add_argument("file", type=Path)
    importing.add_argument("--name", help="default: the name in the file; of a bank (.npz), the file's name")
    importing.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True,
        help="make unit vectors of a bank's others; --no-normalize refuses them",
    )  # fmt: skip
    importing.add_argument("--replace", action="store_true", help="replace the collection")
    embedding = verb("re-embed", "give a collection the vectors of another bundle")
    embedding.add_argument("name")
    embedding.add_argument("--model", help="the bundle; default: the present one of the same name")
    embedding.add_argument("--folder", type=Path, help="the folder that was indexed, if no originals are kept")
    embedding.add_argument("--drop", action="store_true", help="leave out the items that have no source")
    embedding.add_argument("--dimensions", type=int, metavar="N", help="shorten the vectors, if the bundle allows it")
    embedding.add_argument("--truncate", choices=METHODS, help="of a text that is too long; default: the bundle's")
    embedding.add_argument("--threads", type=threads, help=THREADS)
    verb("remove", "delete a collection and all its items, also a damaged one").add_argument("name")
    given = options.parse_args(argv)
    _require_one_target(options, given)
    from calmclip.service import collection_cli

    emit(given.json, collection_cli.run(given, _settings(given), _api_key()), collection_cli.show)
    return 0


def keys_command(argv: list[str]) -> int:
    """`calmclip keys add|list|remove`: the file that CALMCLIP_KEYS names."""
    options = parser("keys", "The API keys of a service: a file of names, hashes and scopes.")
    verb = _verbs(options, _key_file)
    adding = verb("add", "create a key and print it; it is not stored")
    adding.add_argument("name")
    adding.add_argument(
        "--scope", action="append", choices=SCOPES, required=True,
        help="read (ask, search, list), write (change collections and classifiers), metrics; may be repeated",
    )  # fmt: skip
    verb("list", "names and scopes")
    verb("remove", "revoke a key at once").add_argument("name")
    given = options.parse_args(argv)
    if given.file is None:
        raise BadRequest("no file of keys is named; use --file or set CALMCLIP_KEYS")
    from calmclip.service import keys

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


def _verbs(
    options: argparse.ArgumentParser, common: Callable[..., None]
) -> Callable[[str, str], argparse.ArgumentParser]:
    """A function that adds a verb of this verb: name, what it does -> its parser. ``common(parser)`` adds the flags
    that may stand before or after the verb's name."""
    common(options)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common(shared)
    for action in shared._actions:
        action.default = argparse.SUPPRESS  # else it would replace what stood before the name
    verbs = options.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, does: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", parents=[shared])

    return add


def _key_file(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--file", type=Path, default=os.environ.get(KEYS_VARIABLE) or None, help=f"default: {KEYS_VARIABLE}"
    )


def _target(options: argparse.ArgumentParser, *, store: bool = True) -> None:
    """The flags that say which collections are meant. ``store``: also those of another store than the setting's."""
    options.add_argument("--url", help="a running service, such as http://127.0.0.1:8080; default: the store itself")
    if store:
        options.add_argument("--store", help="KIND:LOCATION; default: CALMCLIP_STORE, else the data directory's")
    bundles_option(options)


def _require_one_target(options: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.url and given.store:
        options.error("--url names a service and --store the collections on a disk or in a database; give one of them")


def _settings(given: argparse.Namespace, **more: object) -> "Settings":
    """Of the environment and the flags."""
    from calmclip.service.settings import from_environment

    named = {name: getattr(given, name, None) for name in ("store", "threads")}
    return from_environment(bundles_dir=given.bundles, **named, **more)


def _api_key() -> str | None:
    return os.environ.get("CALMCLIP_API_KEY") or None


def _log_of_the_environment() -> str | None:
    """`Settings.log`, before the other settings are read; like them, in capitals or not."""
    return next((value for name, value in os.environ.items() if name.upper() == "CALMCLIP_LOG"), None)


def _show_keys(result: dict[str, Any]) -> None:
    for key in result["keys"]:
        print(f"{key['name']:24s} {' '.join(key['scopes'])}")


def _show(result: dict[str, Any]) -> None:
    reasons: dict[str, list[str]] = {}
    for picture in result["broken"]:
        reasons.setdefault(picture["why"], []).append(picture["id"])
    for why, ids in reasons.items():
        more = f" and {len(ids) - REASONS} more" if len(ids) > REASONS else ""
        print(f"skipped {', '.join(ids[:REASONS])}{more}: {why}")
    if others := result["passed_over"]:
        print(f"passed over {sum(others.values())} other files: {', '.join(f'{n} {s}' for s, n in others.items())}")
    pruned = f"{result['pruned']} pruned, " if result["pruned"] else ""
    print(
        f"{result['collection']} ({result['model']}): {result['added']} added, {result['skipped']} already present, "
        f"{pruned}{len(result['broken'])} broken; {result['items']} items, {result['seconds']} s"
    )
