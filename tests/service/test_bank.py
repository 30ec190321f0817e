"""Banks: npz files as numpy writes and reads them, without calmclip's writer or reader on the other side."""

import io
import json
import tracemalloc
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models.errors import BadRequest
from calmclip.service import bank
from calmclip.service.stores import Info, Row, open_store

UNITS = np.array([[0.6, 0.8, 0], [0, -1, 0]], np.float32)
DIGEST = "ab" * 32


def arrays(**changes: Any) -> dict[str, Any]:
    """A bank of two items, as another program would make it; a change to None leaves an array out."""
    whole = {
        "ids": np.array(["a", "ünï/2.png"]),
        "vectors": UNITS,
        "model": np.array("UniME"),
        "dim": np.array(3),
        "normalized": np.array(True),
        "meta": np.array(['{"year": 2021}', "{}"]),
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def written(folder: Path, save: Any = np.savez, **changes: Any) -> Path:
    save(folder / "bank.npz", **arrays(**changes))
    return folder / "bank.npz"


def rows(file: bank.File) -> list[Row]:
    return [row for batch in file.rows for row in batch]


def read(source: Any, **options: Any) -> bank.File:
    return bank.read(source, "c", **{"meta_bytes": 100, **options})


@pytest.fixture
def store(tmp_path):
    with closing(open_store(f"lancedb:{tmp_path / 'store'}")) as opened:
        yield opened


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_bank_of_another_program_is_read(tmp_path, save):
    file = read(written(tmp_path, save))
    assert (file.info.name, file.info.model, file.info.digest, file.info.dim) == ("c", "UniME", "", 3)
    assert file.info.foreign
    first, second = rows(file)
    assert (first.id, first.meta, second.id, second.meta) == ("a", {"year": 2021}, "ünï/2.png", {})
    np.testing.assert_array_equal(np.stack([first.vector, second.vector]), UNITS)
    assert file.scaled == 0
    bound = read(written(tmp_path, save, digest=np.array(DIGEST), created=np.array("2020-01-01T00:00:00+00:00")))
    assert (bound.info.digest, bound.info.created, bound.info.foreign) == (DIGEST, "2020-01-01T00:00:00+00:00", False)
    assert [row.meta for row in rows(read(written(tmp_path, save, meta=None)))] == [{}, {}]
    empty = {"ids": np.array([], str), "vectors": np.empty((0, 3), np.float32), "meta": None}
    assert rows(read(written(tmp_path, save, **empty))) == []


def test_vectors_become_unit_vectors_and_the_others_stay_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "BATCH_ROWS", 64)
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 7)).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, (300, 1))
    unit = (vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).astype("f4")
    vectors = vectors.astype(np.float32)
    vectors[::3] = unit[::3]
    change = {"vectors": vectors, "ids": np.arange(300).astype(str), "dim": 7, "normalized": False, "meta": None}
    file = read(written(tmp_path, **change))
    answer = np.stack([row.vector for row in rows(file)])
    assert file.scaled == 200
    np.testing.assert_array_equal(answer[::3], unit[::3])
    np.testing.assert_allclose(answer, unit, atol=1e-7)
    with pytest.raises(BadRequest, match=r"the vector of '1' has the length .* expected a unit vector; let the import"):
        rows(read(written(tmp_path, **change), normalize=False))
    with pytest.raises(BadRequest, match="because the bank says that it is normalized"):
        rows(read(written(tmp_path, **change | {"normalized": True})))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": None}, "has no array 'ids'; expected ids, vectors, model, dim, normalized"),
        ({"model": None}, "has no array 'model'"),
        ({"labels": np.zeros(2)}, "has the array 'labels'"),
        ({"ids": np.array(["a", "b"], object)}, "ids holds pickled objects"),
        ({"vectors": np.array([[1, "b"]], object)}, "vectors holds pickled objects"),
        ({"ids": np.array([1, 2])}, r"ids is int64 \[2\]; expected unicode"),
        ({"ids": np.array([b"a", b"b"])}, r"ids is \|S1 \[2\]; expected unicode"),
        ({"ids": np.array([["a"], ["b"]])}, r"ids is <U1 \[2, 1\]"),
        ({"ids": np.array(["a"])}, "there are 2 vectors and 1 ids"),
        ({"meta": np.array(["{}"] * 3)}, "there are 2 vectors and 3 meta"),
        ({"ids": np.array(["a", "a"])}, "has the id 'a' twice"),
        ({"ids": np.array(["a", ""])}, "has the id ''; expected 1 to 512 characters"),
        ({"ids": np.array(["a", "b\0c"])}, "without NUL"),
        ({"ids": np.array(["a", "b" * 513])}, "ids has texts of up to 513 characters"),
        ({"ids": np.array(["a", "\ud800"])}, "ids: one is no Unicode text"),
        ({"ids": np.array([0x110000, 65], "<u4").view("<U1")}, "ids: one is no Unicode text"),
        ({"vectors": UNITS.astype(np.float64)}, r"vectors is float64 \[2, 3\]; expected float32"),
        ({"vectors": UNITS.astype(np.float16)}, "vectors is float16"),
        ({"vectors": UNITS.astype(">f4")}, "vectors is >f4"),
        ({"vectors": np.asfortranarray(UNITS)}, "Fortran's order"),
        ({"vectors": UNITS[0]}, r"vectors is float32 \[3\]"),
        ({"vectors": np.empty((2, 0), np.float32), "dim": 0}, "the vectors have 0 numbers; expected 1 to 16000"),
        ({"vectors": np.ones((2, 16_001), np.float32), "dim": 16_001}, "expected 1 to 16000"),
        ({"dim": 4}, "dim is 4, but the vectors have 3 numbers"),
        ({"dim": np.array([3])}, "dim is int64"),
        ({"dim": 3.0}, r"dim is float64 \[\]; expected an integer scalar"),
        ({"normalized": 1}, "normalized is int64"),
        ({"model": np.array("")}, "model is ''; expected 1 to 200 characters"),
        ({"model": np.array("a\0b")}, "without NUL"),
        ({"model": np.array("m" * 201)}, "expected 1 to 200 characters"),
        ({"model": np.array("\ud800")}, "model: one is no Unicode text"),
        ({"model": np.array(0x110000, "<u4").view("<U1")}, "model: one is no Unicode text"),
        ({"created": np.array("yesterday")}, "created is 'yesterday'; expected a date"),
        ({"model": np.array("m" * 2000)}, "model has 8000 bytes; expected at most 4096"),
        ({"digest": np.array("AB" * 32)}, "digest is 'ABAB"),
        ({"digest": np.array("ab")}, "64 hexadecimal digits"),
        ({"vectors": np.array([[1, 0, 0], [0, np.nan, 0]], np.float32)}, "'ünï/2.png' has NaN or infinity"),
        ({"vectors": np.array([[np.inf, 0, 0], [1, 0, 0]], np.float32)}, "'a' has NaN or infinity"),
        ({"vectors": np.zeros((2, 3), np.float32), "normalized": False}, "'a' is all zeros"),
        ({"meta": np.array(["{}", "[]"])}, "the meta of 'ünï/2.png': it is an empty list; expected an object"),
        ({"meta": np.array(["{}", ""])}, "is not JSON"),
        ({"meta": np.array(['{"a": NaN}', "{}"])}, "the meta of 'a': it is not JSON"),
        ({"meta": np.array(['{"a": 1, "a": 2}', "{}"])}, "twice"),
        ({"meta": np.array(['{"a": "\\u0000"}', "{}"])}, "contains a NUL character"),
        ({"meta": np.array(['{"a":' * 17 + "1" + "}" * 17, "{}"])}, "nested deeper than 16 levels"),
        ({"meta": np.array(['{"a": "%s"}' % ("x" * 100), "{}"])}, "has 108 bytes; at most 100 are stored"),
        ({"meta": np.array(["{}", " " * (1 << 20) + "{}"])}, "meta has texts of up to 1048578 characters"),
    ],
)
def test_what_is_no_bank_is_refused_and_named(tmp_path, change, says):
    with pytest.raises(BadRequest, match=says):
        rows(read(written(tmp_path, **change)))


def member(data: bytes, name: str = "vectors") -> io.BytesIO:
    """The bank with other bytes in place of one npy file."""
    file = io.BytesIO()
    np.savez(file, **arrays())
    other = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename == f"{name}.npy" else old.read(entry))
    return other


def npy(descr: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "vectors is no npy file"),
        (b"\x93NUMPY\x09\x00v\x00{}", "vectors is no npy file"),
        (npy("<f4", (2, 3), bytes(23)), "expected .* for float32"),
        (npy("<f4", (2, 3), bytes(25)), "expected .* for float32"),
        (npy("<f4", (1 << 60, 1 << 60)), "expected .* for float32"),
        (npy("<f4", (-2, -3), bytes(24)), "expected .* for float32"),
        (npy("<f4", (2, 3))[:-20] + b"(" * 20, "vectors is no npy file"),
        (npy("[('a', '<f4')]", (2, 3), bytes(24)), "vectors is"),
    ],
)
def test_a_damaged_array_is_refused_before_its_size_is_believed(data, says):
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match=says):
            rows(read(member(data)))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_every_cut_and_flipped_bytes_of_vectors_are_noticed(tmp_path):
    data = written(tmp_path).read_bytes()
    for length in range(0, len(data), len(data) // 60):
        with pytest.raises(BadRequest):
            rows(read(io.BytesIO(data[:length])))
    at = data.index(UNITS.tobytes())
    for place in (at, at + 5, at + 23):
        wrong = bytearray(data)
        wrong[place] ^= 1
        with pytest.raises(BadRequest, match=r"damaged|Bad CRC-32"):
            rows(read(io.BytesIO(bytes(wrong))))


def test_an_array_may_not_be_there_twice_or_be_packed_otherwise():
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("ids.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("ids.npy", b"")
    with pytest.raises(BadRequest, match="twice"):
        read(file)
    plain = io.BytesIO()
    np.savez(plain, **arrays())
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_LZMA) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(BadRequest, match="is compressed by method 14"):
        read(file)


def equal(folder: Path, save: Any, count: int) -> Path:
    """A bank of so many equal vectors with 300 numbers."""
    vectors = np.full((count, 300), 300**-0.5, np.float32)
    return written(folder, save, ids=np.arange(count).astype(str), meta=None, dim=300, vectors=vectors)


def test_a_bank_that_unpacks_to_too_much_is_refused_unread(tmp_path):
    path = equal(tmp_path, np.savez_compressed, 5000)
    assert path.stat().st_size < 100_000
    with pytest.raises(BadRequest, match=r"has 64\d+ bytes when unpacked; at most 1048576 are read at once"):
        read(path, most=1 << 20)


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    path = equal(tmp_path, np.savez, 40_000)
    tracemalloc.start()
    try:
        file = read(path)
        assert sum(len(batch) for batch in file.rows) == 40_000
        assert tracemalloc.get_traced_memory()[1] < 24 << 20  # of 51 MB
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(bank, "BATCH_ROWS", 7)
    monkeypatch.setattr(bank, "READ_BYTES", 1)
    assert [row.id for row in rows(read(written(tmp_path)))] == ["a", "ünï/2.png"]


def test_numpy_reads_what_is_written_and_the_round_trip_is_exact(tmp_path, store):
    info = Info("c", "colours-int8", DIGEST, 3, "2026-01-01T00:00:00+00:00", originals=True)
    table = store.create(info)
    long = "ï" * 512
    metas = {"a": {"title": "dünes «x»", "n": 2**53, "deep": [1, {"b": None}]}, long: {}}
    table.upsert([Row(id_, v, meta, "text") for (id_, meta), v in zip(metas.items(), UNITS, strict=True)])
    assert bank.write(table, tmp_path / "c.npz") == 2
    with pytest.raises(BadRequest, match="exists; choose another name"):
        bank.write(table, tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz", allow_pickle=False) as loaded:
        content = {name: loaded[name] for name in loaded.files}
    order = content["ids"].tolist().index("a")
    assert sorted(content["ids"].tolist()) == sorted(metas)
    assert (content["ids"].dtype.kind, content["vectors"].dtype) == ("U", np.float32)
    np.testing.assert_array_equal(content["vectors"][[order, 1 - order]], UNITS)
    assert {
        i: json.loads(text) for i, text in zip(content["ids"].tolist(), content["meta"].tolist(), strict=True)
    } == metas
    scalars = {name: content[name].item() for name in ("model", "dim", "normalized", "digest", "created")}
    assert scalars == {"model": "colours-int8", "dim": 3, "normalized": True, "digest": DIGEST, "created": info.created}

    file = read(tmp_path / "c.npz")
    again = store.replace(file.info, file.rows)
    assert again.info == Info("c", "colours-int8", DIGEST, 3, info.created)
    assert bank.write(again, tmp_path / "again.npz") == 2
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_an_empty_collection_and_one_of_another_program_are_written(tmp_path, store):
    table = store.create(Info("c", "UniME", "", 3, "2026-01-01T00:00:00+00:00"))
    assert bank.write(table, tmp_path / "c.npz") == 0
    with np.load(tmp_path / "c.npz") as loaded:
        assert (loaded["ids"].shape, loaded["vectors"].shape, "digest" in loaded) == ((0,), (0, 3), False)
    assert rows(read(tmp_path / "c.npz")) == []


def test_packing_stops_at_the_limit(store):
    table = store.create(Info("c", "UniME", "", 3, "2026-01-01T00:00:00+00:00"))
    table.upsert([Row(str(i), UNITS[0], {"text": "x" * 50}) for i in range(100)])
    with pytest.raises(BadRequest, match="at most 2000 are sent at once"):
        bank.pack(table, io.BytesIO(), most=2000)
