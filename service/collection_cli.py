"""`calmclip collection VERB`: the collections of a store, or with `--url` of a running service, by our client.

A verb is one row of `VERBS`: what it does to a store, and what to a service; None if it needs the store itself.
"""

import argparse
import asyncio
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import find, names, read
from calmclip.models.errors import BadRequest, CalmclipError, CollectionNotFound, suggestion
from calmclip.models.files import check_name, write_atomically
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.runner import open_bundle
from calmclip.service import bank, parquet
from calmclip.service.client import Client, ClientError
from calmclip.service.exchange import File
from calmclip.service.settings import Settings
from calmclip.service.stores import Store, open_store


class Verb(NamedTuple):
    store: Callable[[Settings, argparse.Namespace], dict[str, Any]]
    service: Callable[[Client, argparse.Namespace], dict[str, Any]] | None


def run(given: argparse.Namespace, settings: Settings, key: str | None) -> dict[str, Any]:
    """The result of the verb, for `show`. ``key``: for the service at ``given.url``. Raises `CalmclipError`s."""
    verb = VERBS[given.verb]
    if given.verb == "create":  # of the others, the name must be known
        check_name("collection", given.name)
    if given.url is None:
        return verb.store(settings, given)
    if verb.service is None:
        raise BadRequest(f"'collection {given.verb}' works on a store, not through a service; leave --url out")
    with at_service(given.url, key) as client:
        return verb.service(client, given)


@contextmanager
def at_service(url: str, key: str | None) -> Iterator[Client]:
    """A client whose errors are `CalmclipError`s."""
    with reported(), Client(url, key=key, timeout=600) as client:
        yield client


@contextmanager
def reported() -> Iterator[None]:
    """A client's errors become `CalmclipError`s, with the same message."""
    try:
        yield
    except ClientError as error:
        raise CalmclipError(str(error)) from None


def _create(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    from calmclip.service.local import Local, transport  # imports all of the service

    async def create() -> Any:
        async with transport(settings, model=given.model) as reached, Local(reached) as client:
            return await client.create_collection(given.name, **_wanted(given))

    with reported():
        return _collection(asyncio.run(create()))


def _create_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    return _collection(client.create_collection(given.name, **_wanted(given)))


def _wanted(given: argparse.Namespace) -> dict[str, Any]:
    return {"model": given.model, "keep_originals": given.keep_originals, "dimensions": given.dimensions}


def _show(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    with _store(settings, read_only=True) as store:
        table = store.open(_known(store, given.name))
        table.verify()
        return {"collection": {**asdict(table.info), "items": table.count()}}


def _show_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    return _collection(client.collection(given.name))


def _collection(collection: Any) -> dict[str, Any]:
    return {"collection": asdict(collection)}


def _items(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    with _store(settings, read_only=True) as store:
        rows = store.open(_known(store, given.name)).page(given.after, given.limit)
    return _page([{"id": row.id, "meta": row.meta} for row in rows], given)


def _items_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    page = client.page(given.name, after=given.after, limit=given.limit)
    return _page([{"id": item.id, "meta": item.meta} for item in page.items], given)


def _page(items: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    return {"items": items, "next": items[-1]["id"] if len(items) == given.limit else None}


def _delete_items(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    with _store(settings) as store:
        table = store.open(_known(store, given.name))
        return _deleted(table.delete(list(dict.fromkeys(given.ids))), given)


def _delete_items_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    return _deleted(client.delete_items(given.name, given.ids).count, given)


def _deleted(count: int, given: argparse.Namespace) -> dict[str, Any]:
    absent = len(set(given.ids)) - count
    more = f"; {absent} of the ids were not there" if absent else ""
    return {"done": f"{given.name}: {count} items removed{more}", "removed": count}


def _list_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    loaded = {model.embedding_digest: model.name for model in client.models()}
    return {
        "collections": [
            {**asdict(entry), "bundle": loaded.get(entry.digest) if entry.digest else None}
            for entry in client.collections()
        ]
    }


def _export_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    _require_bank(given)
    if given.file.exists() and not given.replace:
        raise BadRequest(f"{given.file} exists; choose another name, or --replace")
    items = client.collection(given.name).items
    data = client.export_bank(given.name)
    write_atomically(given.file, data)
    return {"done": f"{given.file}: {items} items of {given.name} (a bank holds no originals)", "items": items}


def _import_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    _require_bank(given)
    if given.replace:
        raise BadRequest("a service replaces no collection by an import; remove it first, or leave --url out")
    name = given.name or given.file.stem
    check_name("collection", name)
    made = client.import_bank(name, given.file, normalize=given.normalize)
    return {"done": f"{name}: {made.items} items of {given.file}{_scaled(made.scaled)}", "items": made.items,
            "scaled": made.scaled}  # fmt: skip


def _require_bank(given: argparse.Namespace) -> None:
    if not _is_bank(given.file):
        raise BadRequest(f"{given.file} is no bank; through a service a collection travels as .npz alone")


def _remove_at(client: Client, given: argparse.Namespace) -> dict[str, Any]:
    client.delete_collection(given.name)
    return {"done": f"{given.name} is deleted"}


def _list(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    bundles = _embeddings(settings.bundles_dir)
    entries: list[dict[str, Any]] = []
    with _store(settings, read_only=True) as store:
        for name in store.names():
            try:
                table = store.open(name)
                table.verify()
                info = table.info
                entries.append({**asdict(info), "items": table.count(), "bundle": bundles.get(info.digest)})
            except CollectionNotFound:  # it was deleted meanwhile
                continue
            except CalmclipError as error:
                entries.append({"name": name, "damaged": str(error)})
    return {"collections": entries}


def _export(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    with _store(settings, read_only=True) as store:
        table = store.open(_known(store, given.name))
        table.verify()
        rows = (bank if _is_bank(given.file) else parquet).write(table, given.file, replace=given.replace)
    left_out = " (a bank holds no originals)" if _is_bank(given.file) and table.info.originals else ""
    return {"done": f"{given.file}: {rows} items of {given.name}{left_out}", "items": rows}


def _import(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    file = _file(settings, given)
    name = file.info.name
    with _store(settings) as store:
        if name in store.names() and not given.replace:
            raise BadRequest(f"there is a collection {name!r} already; choose another --name, or --replace")
        count = store.replace(file.info, file.rows).count()
    done = f"{name}: {count} items of {given.file}{_scaled(file.scaled)}"
    return {"done": done, "items": count, "scaled": file.scaled}


def _scaled(count: int) -> str:
    return f", {count} of whose vectors were no unit vectors and have become such" if count else ""


def _is_bank(file: Path) -> bool:
    return file.suffix == ".npz"


def _file(settings: Settings, given: argparse.Namespace) -> File:
    """The file to import, with the name of the collection that it becomes."""
    if _is_bank(given.file):
        name = given.name or given.file.stem
        check_name("collection", name)
        return bank.read(given.file, name, normalize=given.normalize, meta_bytes=settings.limits.meta_bytes)
    file = parquet.read(given.file)
    file.info = replace(file.info, name=given.name or file.info.name)
    check_name("collection", file.info.name)
    return file


def _re_embed(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    from calmclip.service.reembedding import re_embed  # it imports what decodes and runs graphs

    with _store(settings) as store:
        info = store.open(_known(store, given.name)).info
        model = given.model or info.model
        runner = open_bundle(find(model, settings.bundles_dir), threads=settings.threads, ops=settings.ops)
        bundle, digest = runner.bundle, str(runner.bundle.embedding_digest)
        # a shortened collection stays as it is, if the bundle says that this prefix of its vectors holds
        dimensions = given.dimensions or (info.dim if info.dim in bundle.manifest.dimensions else None)
        if digest == info.digest and (dimensions or bundle.dim) == info.dim:
            already = f"{given.name} has the vectors of {model} already (embedding {digest[:12]}…)"
            return {"done": already, "items": None, "digest": digest}
        how = Truncation.of(given.truncate) if given.truncate else None
        counts = re_embed(
            store, given.name, runner, given.folder, drop=given.drop, truncation=how, dimensions=dimensions
        )
    dropped = [f"left out {id_}" for id_ in counts.dropped]
    changed = f", {counts.changed} of changed files" if counts.changed else ""
    length = f", {dimensions} numbers of {bundle.dim}" if dimensions else ""
    done = f"{given.name}: {counts.items} items embedded by {model} (embedding {digest[:12]}…{length}){changed}"
    return {"done": "\n".join([*dropped, done]), **asdict(counts), "digest": digest}


def _remove(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    with _store(settings) as store:
        store.drop(_known(store, given.name))
    return {"done": f"{given.name} is deleted"}


VERBS = {
    "create": Verb(_create, _create_at),
    "list": Verb(_list, _list_at),
    "show": Verb(_show, _show_at),
    "items": Verb(_items, _items_at),
    "delete-items": Verb(_delete_items, _delete_items_at),
    "export": Verb(_export, _export_at),
    "import": Verb(_import, _import_at),
    "re-embed": Verb(_re_embed, None),
    "remove": Verb(_remove, _remove_at),
}


@contextmanager
def _store(settings: Settings, *, read_only: bool = False) -> Iterator[Store]:
    store = open_store(settings.store_url, read_only=read_only)
    try:
        yield store
    finally:
        store.close()


def _known(store: Store, name: str) -> str:
    """Raises `CollectionNotFound`."""
    if name not in (known := store.names()):
        raise CollectionNotFound(f"there is no collection {name!r}; {suggestion(name, known)}", known=known)
    return name


def _embeddings(bundles: Path) -> dict[str, str]:
    """Embedding digest -> a bundle that has it. A bundle that does not open has none."""
    digests: dict[str, str] = {}
    for name in names(bundles):
        try:
            bundle = Bundle(read(bundles / name, verify=False))
        except CalmclipError:
            continue
        if bundle.embedding_digest:
            digests.setdefault(bundle.embedding_digest, name)
    return digests


def bundle_of(settings: Settings, name: str) -> str | None:
    """The bundle that embeds as the collection's; None if there is none. Raises `CollectionNotFound`."""
    with _store(settings, read_only=True) as store:
        info = store.open(_known(store, name)).info
    return _embeddings(settings.bundles_dir).get(info.digest)


def show(result: dict[str, Any]) -> None:
    for name, value in result.get("collection", {}).items():
        print(f"{name:10s} {value}")
    for item in result.get("items") or () if "next" in result else ():
        print(f"{item['id']}  {item['meta'].get('title', '')}".rstrip())
    if result.get("next") is not None:
        print(f"more items follow: --after {shlex.quote(result['next'])}")
    for entry in result.get("collections", ()):
        if "damaged" in entry:
            print(f"{entry['name']:24s} does not open: {entry['damaged']}")
        else:
            filled = f"it was filled by {entry['model']}" if entry["digest"] else f"its vectors are {entry['model']}'s"
            bundle = entry["bundle"] or f"none of its embedding; {filled}"
            print(f"{entry['name']:24s} {entry['items']:9d} items  {entry['created']}  bundle: {bundle}")
    if done := result.get("done"):
        print(done)
