"""kill -9 while clients write over HTTP: every acknowledged upsert is stored, and no upsert is stored in part."""

import random
import threading
import time
from collections import defaultdict

import httpx
import pytest

from tests.process import serving

TOGETHER = 4  # items of one upsert
CLIENTS = 3
COLOURS = ["red", "green", "blue", "yellow"]


class Client(threading.Thread):
    """Writes new items and overwrites the same four items until the service is gone; notes the answered upserts."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__()
        self.url = url
        self.name = name
        self.sent = 0
        self.acknowledged: list[int] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=20) as client:
            try:
                while True:
                    self.sent += 1
                    fresh = [f"{self.name}-{self.sent}-{i}" for i in range(TOGETHER)]
                    overwritten = [f"{self.name.partition('.')[0]}-same-{i}" for i in range(TOGETHER)]
                    meta = {"batch": f"{self.name}-{self.sent}", "at": time.time()}
                    items = [
                        {"id": id_, "text": text, "meta": meta}
                        for id_, text in zip(fresh + overwritten, COLOURS * 2, strict=True)
                    ]
                    answer = client.post("/v1/collections/c/items", json={"items": items})
                    assert answer.status_code == 200, answer.text
                    self.acknowledged.append(self.sent)
            except httpx.HTTPError:
                pass


def rounds(bundles, data, count, **environment) -> int:
    """The number of acknowledged upserts over all rounds."""
    chance = random.Random(0)
    acknowledged: set[str] = set()
    clients: list[Client] = []
    for turn in range(count + 1):
        with serving(bundles, data, **environment) as (process, client, _log):
            if turn:
                check(client, acknowledged, clients)
            assert client.put("/v1/collections/c", json={}).status_code in (200, 201)
            if turn == count:
                return len(acknowledged)
            clients = [Client(str(client.base_url), f"c{i}.{turn}") for i in range(CLIENTS)]
            for writer in clients:
                writer.start()
            before = time.monotonic()
            while not all(writer.acknowledged for writer in clients):
                assert time.monotonic() < before + 20
                time.sleep(0.01)
            time.sleep(chance.uniform(0.02, 0.4))
            process.kill()
            for writer in clients:
                writer.join()
            acknowledged |= {f"{writer.name}-{n}" for writer in clients for n in writer.acknowledged}
    raise AssertionError


def check(client: httpx.Client, acknowledged: set[str], clients: list[Client]) -> None:
    fresh: dict[str, int] = defaultdict(int)
    overwritten: dict[str, set[str]] = defaultdict(set)
    after: dict[str, str] = {}
    while True:
        page = client.get("/v1/collections/c/items", params={"limit": 1000, **after}).json()
        for item in page["items"]:
            batch = item["meta"]["batch"]
            if "-same-" in item["id"]:
                overwritten[item["id"].partition("-")[0]].add(batch)
            else:
                assert item["id"].startswith(batch + "-")
                fresh[batch] += 1
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert not acknowledged - fresh.keys(), "acknowledged upserts are lost"
    assert set(fresh.values()) == {TOGETHER}, "an upsert is stored in part"
    for writer in clients:
        (batch,) = overwritten[writer.name.partition(".")[0]]  # all four items are of the same upsert
        turn, number = batch.rpartition("-")[::2]
        assert turn == writer.name
        assert int(number) in (writer.acknowledged[-1], writer.sent)  # the last answered upsert, or the killed upsert
    hits = client.post("/v1/collections/c/search", json={"query": {"text": "red"}, "top_k": 5}).json()["hits"]
    assert [hit["score"] for hit in hits] == pytest.approx([1] * 5, abs=1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_lancedb(bundles, tmp_path, count):
    done = rounds(bundles, tmp_path / "data", count)
    print(f"{done} upserts acknowledged in {count} rounds")


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_pgvector(bundles, tmp_path, postgres, count):
    done = rounds(bundles, tmp_path / "data", count, CALMCLIP_STORE=f"pgvector:{postgres.database()}")
    print(f"{done} upserts acknowledged in {count} rounds")
