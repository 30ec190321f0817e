"""Search of a collection: recall of the ten nearest, and latency, of each way there is, taking turns.

    python -m tests.bench.search [--pictures DIR] [--bundle models/bundles/mini-int8] [--rows 100000] [--dim 512]
        [--postgres postgresql://…]

Vectors are those of the pictures in DIR, or of many cuts of the few that ship, but for each thirtieth, which are
queries, as the texts that ship are. Up to ``--rows`` they are mixed: a picture's vector, plus a part of the way between
two more, plus a little noise; a seed makes them the same each time. An isometry takes them to ``--dim``, where that is
more than the bundle's: cosines stay what they are. Truth is a product in float64.

Cuts of a dozen pictures are a hard case and no natural one; for figures to go by, give it thousands of pictures.
"""

import argparse
import io
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from calmclip.export.samples import pictures, texts
from calmclip.models.flow import Array
from calmclip.models.runner import open_bundle
from calmclip.service.quantized import Quantized
from calmclip.service.stores import Info, Row, Table, open_store
from tests.bench.alternate import machine

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TOP = 10
EACH = 30  # one picture in so many is a query
CUTS = 100
MIXED = 0.2, 0.8  # how far a mixture goes
NOISE = 0.1  # its length beside a vector's 1
AT_ONCE = 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pictures", type=Path)
    options.add_argument("--bundle", type=Path, default=Path("models/bundles/mini-int8"))
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--queries", type=int, default=300)
    options.add_argument("--postgres", help="the URL of an empty database")
    given = options.parse_args()
    vectors, queries = data(given.bundle, given.pictures, given.rows, given.dim, given.queries)
    cosines = queries.astype(np.float64) @ vectors.T
    truth = np.argpartition(-cosines, TOP, axis=1)[:, :TOP]
    print(machine(0))
    print(f"{len(vectors)} x {vectors.shape[1]}; {len(queries)} queries, the tenth hit at a cosine of "
          f"{np.sort(cosines, axis=1)[:, -TOP].mean():.2f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for ways in sides(folder, given.postgres, vectors):
            measure(ways, queries, truth)


def data(bundle: Path, folder: Path | None, rows: int, dim: int, most: int) -> tuple[Array, Array]:
    """float32 [rows, dim] and the queries, [N, dim]; unit rows."""
    runner = open_bundle(bundle)
    seen = np.stack([runner.embed(images=[one])[0] for one in shown(folder)])
    asked = np.concatenate([seen[::EACH], runner.embed(texts=texts())])
    kept = np.delete(seen, np.s_[::EACH], axis=0)
    rng = np.random.default_rng(0)
    here, there, hence = rng.integers(0, len(kept), (3, rows))
    here[: len(kept)] = np.arange(len(kept))[:rows]
    far = rng.uniform(*MIXED, (rows, 1))
    far[: len(kept)] = 0  # the pictures themselves
    mixed = kept[here] + far * (kept[there] - kept[hence])
    mixed += rng.normal(size=mixed.shape) * (NOISE / mixed.shape[1] ** 0.5) * (far > 0)
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    if dim > mixed.shape[1]:
        isometry = np.linalg.qr(rng.normal(size=(dim, mixed.shape[1])))[0].T
        mixed, asked = mixed @ isometry, asked @ isometry
    asked = asked[rng.permutation(len(asked))[:most]]
    return mixed.astype(np.float32), np.ascontiguousarray(asked, dtype=np.float32)


def shown(folder: Path | None) -> Iterator[Path | bytes]:
    """Every picture in the folder; or `CUTS` random cuts of each that ships, of a tenth of its area or more."""
    if folder is not None:
        yield from sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        return
    rng = np.random.default_rng(0)
    for _ in range(CUTS):
        for path in pictures():
            with Image.open(path) as picture:
                size = np.array(picture.size)
                cut = (size * rng.uniform(0.1, 1.0) ** 0.5).astype(int)
                corner = (rng.uniform(size=2) * (size - cut)).astype(int)
                file = io.BytesIO()
                picture.convert("RGB").crop((*corner, *(corner + cut))).save(file, "JPEG")
            yield file.getvalue()


Search = Callable[[Array], list[str]]


def sides(folder: str, postgres: str | None, vectors: Array) -> Iterator[dict[str, Search]]:
    """Name -> how to search; those that share a machine's time take turns."""
    info = Info("bench", "bench", "0" * 64, vectors.shape[1], "2026-01-01T00:00:00+00:00")
    with closing(open_store(f"lancedb:{folder}/store")) as store:
        table = filled(store.create(info), vectors, "LanceDB")
        plain = table._table  # type: ignore[attr-defined]

        def flat(query: Array) -> list[str]:
            found = plain.search(query).distance_type("cosine").bypass_vector_index()
            return [row["id"] for row in found.select(["id", "meta", "_distance"]).limit(TOP).to_list()]

        before, start = rss(), perf_counter()
        copied = Quantized(table, 1 << 40)  # type: ignore[arg-type]
        print(f"the copy was made in {perf_counter() - start:.1f} s, and takes {rss() - before} MB")
        yield {"LanceDB, all rows": flat, "LanceDB": by(table), "LanceDB and a copy in memory": by(copied)}
    if postgres:
        from calmclip.service.stores import pgvector

        with closing(open_store(f"pgvector:{postgres}")) as store:
            table = filled(store.create(info), vectors, "PostgreSQL")
            exact = pgvector.PgTable(table._server, table._number, info)  # type: ignore[attr-defined]
            exact._rows = 0  # so few that it sorts them all
            yield {"PostgreSQL, all rows": by(exact), "PostgreSQL": by(table)}
            store.drop("bench")


def by(table: Table) -> Search:
    return lambda query: [one.id for one in table.search(query, TOP)]


def filled(table: Table, vectors: Array, name: str) -> Table:
    start = perf_counter()
    for at in range(0, len(vectors), AT_ONCE):
        rows = [Row(str(i), vectors[i], {"title": f"picture {i}"}) for i in range(at, min(at + AT_ONCE, len(vectors)))]
        table.upsert(rows)
    written = perf_counter()
    table.compact()
    table.count()
    print(f"{name}: written in {written - start:.1f} s, tidied up in {perf_counter() - written:.1f} s", flush=True)
    return table


def measure(ways: dict[str, Search], queries: Array, truth: Array) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    hits = dict.fromkeys(ways, 0)
    for search in ways.values():
        for query in queries[:3]:
            search(query)
    for query, right in zip(queries, truth, strict=True):
        for name, search in ways.items():
            start = perf_counter()
            found = search(query)
            seconds[name].append(perf_counter() - start)
            hits[name] += len({*found} & {*map(str, right)})
    for name, times in seconds.items():
        p50, p95 = np.quantile(times, (0.5, 0.95)) * 1000
        print(f"{name:30s} recall@{TOP} {hits[name] / truth.size:.4f}   p50 {p50:6.1f} ms   p95 {p95:6.1f} ms"
              f"   least {min(times) * 1000:6.1f} ms", flush=True)  # fmt: skip


def rss() -> int:
    """MB, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


if __name__ == "__main__":
    main()
