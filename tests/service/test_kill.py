"""kill -9 while clients insert, overwrite and delete over HTTP, and while `calmclip collection re-embed` runs.

Every acknowledged change is stored, no request is stored in part, and the vectors are all of one bundle.
"""

import base64
import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.process import serving

TOGETHER = 4  # items of one upsert
CLIENTS = 3
ROUNDS = 100
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
MEANS = {"colours-int8": (0, 0, 0), "shifted-int8": (0.5, 0.25, 0)}  # of the two bundles
BUSY = (503, 504)  # of a request that waited for re-embed


class Client(threading.Thread):
    """Writes new items, overwrites the same four items and deletes older ones until the service is gone."""

    def __init__(self, url: str, name: str, images: dict[str, str]) -> None:
        super().__init__()
        self.url = url
        self.name = name
        self.images = images
        self.sent = 0
        self.acknowledged: list[int] = []
        self.deleting: set[int] = set()  # the request was sent,
        self.deleted: set[int] = set()  # and answered

    def run(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=20) as client:
            try:
                while True:
                    self.sent += 1
                    self.upsert(client)
                    if self.sent % 3 == 0 and self.acknowledged:
                        self.delete(client, self.acknowledged[len(self.acknowledged) // 2])
            except httpx.HTTPError:
                pass

    def upsert(self, client: httpx.Client) -> None:
        fresh = [f"{self.name}-{self.sent}-{i}" for i in range(TOGETHER)]
        overwritten = [f"{self.name.partition('.')[0]}-same-{i}" for i in range(TOGETHER)]
        items = [
            {
                "id": id_,
                "image": {"b64": self.images[colour]},
                "meta": {"batch": f"{self.name}-{self.sent}", "c": colour},
            }
            for id_, colour in zip(fresh + overwritten, [*COLOURS, *COLOURS], strict=True)
        ]
        if self.answered(client.post("/v1/collections/c/items", json={"items": items})):
            self.acknowledged.append(self.sent)

    def delete(self, client: httpx.Client, number: int) -> None:
        self.deleting.add(number)
        ids = [f"{self.name}-{number}-{i}" for i in range(TOGETHER)]
        if self.answered(client.request("DELETE", "/v1/collections/c/items", json={"ids": ids})):
            self.deleted.add(number)

    @staticmethod
    def answered(answer: httpx.Response) -> bool:
        assert answer.status_code in (200, *BUSY), answer.text
        return answer.status_code == 200


class Trial:
    """One store through many rounds. ``beside``: whether re-embed may run beside the service."""

    def __init__(self, bundles: Path, data: Path, picture, *, beside: bool, **environment: str) -> None:
        self.bundles, self.data, self.beside, self.environment = bundles, data, beside, environment
        self.images = {name: base64.b64encode(picture(name, size=(8, 8))).decode() for name in COLOURS}
        self.chance = random.Random(0)
        self.acknowledged: set[str] = set()
        self.deleting: set[str] = set()
        self.deleted: set[str] = set()
        self.clients: list[Client] = []
        self.embedded = self.killed = 0  # runs of re-embed that ended, and that were killed

    def rounds(self, count: int) -> None:
        models = [*MEANS]
        for turn in range(count + 1):
            with serving(self.bundles, self.data, **self.environment) as (process, client, _log):
                if turn:
                    self.check(client)
                assert client.put("/v1/collections/c", json={"keep_originals": True}).status_code in (200, 201, 409)
                if turn == count:
                    break
                self.clients = [Client(str(client.base_url), f"c{i}.{turn}", self.images) for i in range(CLIENTS)]
                for writer in self.clients:
                    writer.start()
                before = time.monotonic()
                while not all(writer.acknowledged for writer in self.clients):
                    assert time.monotonic() < before + 20
                    time.sleep(0.01)
                if self.beside and turn % 2 == 0:
                    self.re_embed(models[turn // 2 % 2])
                time.sleep(self.chance.uniform(0.02, 0.4))
                process.kill()
                for writer in self.clients:
                    writer.join()
            self.note()
            if not self.beside and turn % 2 == 0:
                self.re_embed(models[turn // 2 % 2])
        self.check_vectors()

    def note(self) -> None:
        for writer in self.clients:
            self.acknowledged |= {f"{writer.name}-{n}" for n in writer.acknowledged}
            self.deleting |= {f"{writer.name}-{n}" for n in writer.deleting}
            self.deleted |= {f"{writer.name}-{n}" for n in writer.deleted}

    def cli(self, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "calmclip.models.cli", "collection", "--bundles", str(self.bundles), *words]
        environment = {**os.environ, "CALMCLIP_DATA_DIR": str(self.data), **self.environment}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def re_embed(self, model: str) -> None:
        """Of two runs one is killed, at any moment of its work."""
        with self.cli("re-embed", "c", "--model", model) as process:
            if self.chance.random() < 0.5:
                time.sleep(self.chance.uniform(0.7, 2.5))
                process.kill()
            output, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -9), output
        self.embedded += process.returncode == 0
        self.killed += process.returncode != 0

    def check(self, client: httpx.Client) -> None:
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
        assert not self.acknowledged - self.deleting - fresh.keys(), "acknowledged upserts are lost"
        assert not self.deleted & fresh.keys(), "acknowledged deletions are lost"
        assert set(fresh.values()) == {TOGETHER}, "an upsert or a deletion is stored in part"
        for writer in self.clients:
            (batch,) = overwritten[writer.name.partition(".")[0]]  # all four items are of the same upsert
            turn, number = batch.rpartition("-")[::2]
            assert turn == writer.name
            assert writer.acknowledged[-1] <= int(number) <= writer.sent  # the last answered upsert, or a later one
        # among some with the same metadata, so that all are compared: an index of thousands of rows with four different
        # vectors may not find the nearest
        body = {"query": {"image": {"b64": self.images["red"]}}, "top_k": 5, "filter": {"c": "red"}}
        hits = client.post("/v1/collections/c/search", json=body).json()["hits"]
        assert [hit["score"] for hit in hits] == pytest.approx([1] * 5, abs=1e-5)

    def check_vectors(self) -> None:
        file = self.data / "c.parquet"
        with self.cli("export", "c", str(file)) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        table = pq.read_table(file)
        model = next(name for name in MEANS if f'"model": "{name}"' in table.schema.metadata[b"calmclip"].decode())
        for row in table.to_pylist():
            colour = next(name for name in COLOURS if f'"c": "{name}"' in row["meta"])
            expected = np.subtract(COLOURS[colour], MEANS[model])
            assert row["vector"] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
            assert base64.b64encode(row["picture"]).decode() == self.images[colour]


@pytest.fixture(scope="module")
def bundles(bundle_maker, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bundles")
    for name, mean in MEANS.items():
        bundle_maker(folder, name, mean=mean)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("store", ["lancedb", "pgvector"])
def test_nothing_acknowledged_is_lost(bundles, tmp_path, picture, request, store):
    shared = store == "pgvector"
    environment = {"CALMCLIP_STORE": f"pgvector:{request.getfixturevalue('postgres').database()}"} if shared else {}
    trial = Trial(bundles, tmp_path / "data", picture, beside=shared, **environment)
    trial.rounds(ROUNDS)
    print(
        f"{store}: {ROUNDS} rounds, {len(trial.acknowledged)} upserts and {len(trial.deleted)} deletions acknowledged, "
        f"re-embed: {trial.embedded} complete, {trial.killed} killed"
    )
