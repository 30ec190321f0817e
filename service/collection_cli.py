"""`calmclip collection list|export|import|re-embed|remove`: the collections of a store, without a service."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import find, names, read
from calmclip.models.errors import BadRequest, CalmclipError, CollectionNotFound, suggestion
from calmclip.models.files import check_name
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.runner import open_bundle
from calmclip.service import bank, parquet
from calmclip.service.exchange import File
from calmclip.service.settings import Settings
from calmclip.service.stores import Store, open_store


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
    scaled = f", {file.scaled} of whose vectors were no unit vectors and have become such" if file.scaled else ""
    return {"done": f"{name}: {count} items of {given.file}{scaled}", "items": count, "scaled": file.scaled}


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


VERBS = {"list": _list, "export": _export, "import": _import, "re-embed": _re_embed, "remove": _remove}


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


def show(result: dict[str, Any]) -> None:
    for entry in result.get("collections", ()):
        if "damaged" in entry:
            print(f"{entry['name']:24s} does not open: {entry['damaged']}")
        else:
            filled = f"it was filled by {entry['model']}" if entry["digest"] else f"its vectors are {entry['model']}'s"
            bundle = entry["bundle"] or f"none of its embedding; {filled}"
            print(f"{entry['name']:24s} {entry['items']:9d} items  {entry['created']}  bundle: {bundle}")
    if done := result.get("done"):
        print(done)
