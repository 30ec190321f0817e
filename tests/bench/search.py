"""Search of a collection: recall of the ten nearest rows and latency of every method, in turns; time of `verify` and
`rows`.

    python -m tests.bench.search [--pictures DIR] [--bundle models/bundles/mini-int8] [--rows 100000] [--dim 512]
        [--postgres postgresql://…]

Vectors are those of the pictures in DIR, or of many crops of the shipped pictures. Every thirtieth one is a query, and
so are the shipped texts. Mixtures fill up the table to ``--rows``: a vector, plus a part of the difference of two more,
plus a little noise, with a fixed seed. If ``--dim`` exceeds the bundle's width, an isometry maps the vectors; cosines
stay. The true neighbours come from a product in float64.

Crops of a dozen pictures are harder than natural data: measure with thousands of pictures.
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
from calmclip.service.quantized import QuantizedTable
from calmclip.service.stores import Info, Row, Table, open_store
from tests.bench.alternate import machine

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TOP = 10
EACH = 30  # pictures per query
CROPS = 100
MIXED = 0.2, 0.8  # the part of the difference
NOISE = 0.1  # its length; vectors have length 1
AT_ONCE = 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pictures", type=Path)
    options.add_argument("--bundle", type=Path, default=Path("models/bundles/mini-int8"))
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--dim", type=int, default=512)
    options.add_argument("--queries", type=int, default=300)
    options.add_argument("--postgres", help="the URL of an empty database")
    arguments = options.parse_args()
    vectors, queries = data(arguments.bundle, arguments.pictures, arguments.rows, arguments.dim, arguments.queries)
    cosines = queries.astype(np.float64) @ vectors.T
    truth = np.argpartition(-cosines, TOP, axis=1)[:, :TOP]
    print(machine(0))
    print(f"{len(vectors)} x {vectors.shape[1]}; {len(queries)} queries, the tenth hit at a cosine of "
          f"{np.sort(cosines, axis=1)[:, -TOP].mean():.2f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for ways in sides(folder, arguments.postgres, vectors):
            measure(ways, queries, truth)


def data(bundle: Path, folder: Path | None, rows: int, dim: int, most: int) -> tuple[Array, Array]:
    """Rows [rows, dim] and queries [N, dim]: float32 unit vectors."""
    runner = open_bundle(bundle)
    vectors = np.stack([runner.embed(images=[picture])[0] for picture in sources(folder)])
    queries = np.concatenate([vectors[::EACH], runner.embed(texts=texts())])
    vectors = np.delete(vectors, np.s_[::EACH], axis=0)
    rng = np.random.default_rng(0)
    base, end, start = rng.integers(0, len(vectors), (3, rows))
    base[: len(vectors)] = np.arange(len(vectors))[:rows]
    far = rng.uniform(*MIXED, (rows, 1))
    far[: len(vectors)] = 0  # the vectors of the pictures, unmixed
    mixed = vectors[base] + far * (vectors[end] - vectors[start])
    mixed += rng.normal(size=mixed.shape) * (NOISE / mixed.shape[1] ** 0.5) * (far > 0)
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    if dim > mixed.shape[1]:
        isometry = np.linalg.qr(rng.normal(size=(dim, mixed.shape[1])))[0].T
        mixed, queries = mixed @ isometry, queries @ isometry
    queries = queries[rng.permutation(len(queries))[:most]]
    return mixed.astype(np.float32), np.ascontiguousarray(queries, dtype=np.float32)


def sources(folder: Path | None) -> Iterator[Path | bytes]:
    """The pictures in ``folder``, or `CROPS` random crops of each shipped picture, of at least a tenth of it."""
    if folder is not None:
        yield from sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        return
    rng = np.random.default_rng(0)
    for _ in range(CROPS):
        for path in pictures():
            with Image.open(path) as picture:
                size = np.array(picture.size)
                crop = (size * rng.uniform(0.1, 1.0) ** 0.5).astype(int)
                corner = (rng.uniform(size=2) * (size - crop)).astype(int)
                file = io.BytesIO()
                picture.convert("RGB").crop((*corner, *(corner + crop))).save(file, "JPEG")
            yield file.getvalue()


Search = Callable[[Array], list[str]]


def sides(folder: str, postgres: str | None, vectors: Array) -> Iterator[dict[str, Search]]:
    """Name -> search function, in groups that take turns."""
    info = Info("bench", "bench", "0" * 64, vectors.shape[1], "2026-01-01T00:00:00+00:00")
    with closing(open_store(f"lancedb:{folder}/store")) as store:
        table = filled(store.create(info), vectors, "LanceDB")
        plain = table._table  # type: ignore[attr-defined]

        def flat(query: Array) -> list[str]:
            hits = plain.search(query).distance_type("cosine").bypass_vector_index()
            return [row["id"] for row in hits.select(["id", "meta", "_distance"]).limit(TOP).to_list()]

        before, start = rss(), perf_counter()
        copied = QuantizedTable(table, 1 << 40)  # type: ignore[arg-type]
        print(f"the copy was made in {perf_counter() - start:.1f} s, and takes {rss() - before} MB")
        yield {"LanceDB, all rows": flat, "LanceDB": by(table), "LanceDB and a copy in memory": by(copied)}
    if postgres:
        from calmclip.service.stores import pgvector

        with closing(open_store(f"pgvector:{postgres}")) as store:
            table = filled(store.create(info), vectors, "PostgreSQL")
            exact = pgvector.PgTable(table._server, table._number, info)  # type: ignore[attr-defined]
            exact._rows = 0  # a table this small is searched exactly
            yield {"PostgreSQL, all rows": by(exact), "PostgreSQL": by(table)}
            store.drop("bench")


def by(table: Table) -> Search:
    return lambda query: [hit.id for hit in table.search(query, TOP)]


def filled(table: Table, vectors: Array, name: str) -> Table:
    start = perf_counter()
    for at in range(0, len(vectors), AT_ONCE):
        rows = [Row(str(i), vectors[i], {"title": f"picture {i}"}) for i in range(at, min(at + AT_ONCE, len(vectors)))]
        table.upsert(rows)
    written = perf_counter()
    table.compact()
    table.count()
    print(f"{name}: written in {written - start:.1f} s, tidied up in {perf_counter() - written:.1f} s", flush=True)
    start = perf_counter()
    table.verify()
    print(f"{name}: verified in {(perf_counter() - start) * 1000:.0f} ms", flush=True)
    start = perf_counter()
    count = sum(map(len, table.rows()))
    print(f"{name}: {count} rows read out in {perf_counter() - start:.1f} s", flush=True)
    return table


def measure(ways: dict[str, Search], queries: Array, truth: Array) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    hits = dict.fromkeys(ways, 0)
    for search in ways.values():
        for query in queries[:3]:
            search(query)
    for query, nearest in zip(queries, truth, strict=True):
        for name, search in ways.items():
            start = perf_counter()
            ids = search(query)
            seconds[name].append(perf_counter() - start)
            hits[name] += len({*ids} & {*map(str, nearest)})
    for name, times in seconds.items():
        p50, p95 = np.quantile(times, (0.5, 0.95)) * 1000
        print(f"{name:30s} recall@{TOP} {hits[name] / truth.size:.4f}   p50 {p50:6.1f} ms   p95 {p95:6.1f} ms"
              f"   least {min(times) * 1000:6.1f} ms", flush=True)  # fmt: skip


def rss() -> int:
    """The current resident set in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


if __name__ == "__main__":
    main()
