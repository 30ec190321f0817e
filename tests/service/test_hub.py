"""Bundles while the service lives: warm before they serve, renewed when they change, at rest when nobody asks."""

import asyncio
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import calmclip.service.hub
from calmclip.models.errors import BundleInvalid, Overloaded
from calmclip.service.hub import Hub
from calmclip.service.metrics import Metrics
from calmclip.service.resting import Resting
from tests.asking import raw, until

WORD = {"ids": np.ones((1, 1), np.int64), "mask": np.ones((1, 1), np.int64)}  # "red"


@pytest.fixture
def own(settings, bundle_maker, tmp_path):
    """Settings over a folder of its own that may be changed."""
    bundle_maker(tmp_path / "bundles", note="old")
    return lambda **changes: settings(bundles_dir=tmp_path / "bundles", **changes)


def at(settings, scenario):
    """Run ``scenario(hub)`` over a hub that has loaded."""

    async def main():
        hub = Hub(settings, Metrics(settings), lambda: False)
        await hub.load()
        try:
            return await scenario(hub)
        finally:
            await hub.close()

    return asyncio.run(main())


def series(hub, name: str, **labels: str) -> float | None:
    return hub.metrics.registry.get_sample_value(f"calmclip_{name}", labels)


def test_every_graph_has_run_before_it_is_ready(own, monkeypatch):
    run: set[str] = set()

    class Told(calmclip.service.hub.Session):
        def run(self, feeds):
            run.add(self.path.stem)
            return super().run(feeds)

    monkeypatch.setattr(calmclip.service.hub, "Session", Told)

    async def scenario(hub):
        return hub.ready, set(run), series(hub, "bundle_load_seconds", model="colours-int8")

    ready, seen, seconds = at(own(), scenario)
    assert ready
    assert seen == {"image", "text", "regions", "detect"}
    assert seconds > 0


def test_a_bundle_whose_graph_breaks_when_it_runs_does_not_load(own, monkeypatch):
    def broken(self, feeds):
        raise BundleInvalid("the graph is broken")

    monkeypatch.setattr(calmclip.service.hub.Session, "run", broken)

    async def scenario(hub):
        return hub.ready, hub.failed

    assert at(own(), scenario) == (False, {"colours-int8": "the graph is broken"})


def test_a_changed_bundle_takes_the_name_and_what_is_under_way_ends_on_the_old_one(own, bundle_maker):
    settings = own()

    async def scenario(hub):
        old = hub.get("colours-int8", "embed")
        await hub.renew()
        assert hub.get("colours-int8", "embed") is old  # nothing has changed
        with old.lease():
            new = bundle_maker(settings.bundles_dir, note="new", replace=True)
            await hub.renew()
            assert hub.get("colours-int8", "embed").digest == new.digest != old.digest
            assert hub.by_digest(old.digest) is None
            await asyncio.sleep(0.2)
            answer = await old.batchers["text"].run(WORD)
            assert answer.outputs["text_embeds"].tolist() == [[1, 0, 0]]
        await asyncio.sleep(0.2)
        with pytest.raises(Overloaded, match="unloaded"):
            await old.batchers["text"].run(WORD)
        infos = [s.labels["sha256"] for s in next(iter(hub.metrics.info.collect())).samples]
        assert infos == [new.digest]
        assert hub.ready
        return series(hub, "bundle_reloads_total", model="colours-int8", outcome="ok")

    assert at(settings, scenario) == 1


def test_one_that_does_not_load_leaves_the_old_one_where_it_is(own, bundle_maker):
    settings = own()

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="broken", replace=True)
        (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.renew()
        assert hub.get(None, "embed") is old
        assert hub.ready
        assert (await old.batchers["text"].run(WORD)).outputs["text_embeds"].tolist() == [[1, 0, 0]]
        failed = series(hub, "bundle_reloads_total", model="colours-int8", outcome="failed")
        bundle_maker(settings.bundles_dir, note="whole", replace=True)
        await hub.renew()
        assert hub.get(None, "embed") is not old
        return failed

    assert at(settings, scenario) == 1  # and not tried again until it is another


def test_one_that_did_not_load_at_the_start_is_taken_once_it_is_whole(own, bundle_maker):
    settings = own()
    (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")

    async def scenario(hub):
        assert not hub.ready
        bundle_maker(settings.bundles_dir, note="whole", replace=True)
        await hub.renew()
        return hub.ready

    assert at(settings, scenario)


def test_no_request_fails_while_a_bundle_is_replaced(own, serve, bundle_maker, picture):
    settings = own(reload_s=0.05)
    with serve(settings) as client, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> tuple[int, float]:
            answer = client.post("/v1/detect?labels=red", **raw(picture("red")))
            return answer.status_code, answer.json()["detections"][0]["score"]

        answers = pool.map(ask, range(400))
        new = bundle_maker(settings.bundles_dir, note="new", replace=True)
        assert set(answers) == {(200, 1.0)}
        until(lambda: client.get("/v1/models").json()["models"][0]["digest"] == new.digest)
        assert ask(0) == (200, 1.0)


def test_a_graph_nobody_uses_leaves_memory_and_comes_back(own, serve, picture):
    def open_graphs(client) -> set[str]:
        return set(re.findall(r'calmclip_graph_open{graph="(\w+)".*} 1.0', client.get("/metrics").text))

    with serve(own(idle_unload_s=0.2)) as client:
        until(lambda: not open_graphs(client))
        assert client.get("/readyz").status_code == 200
        answer = client.post("/v1/classify?labels=red", **raw(picture("red")))
        assert (answer.status_code, answer.json()["labels"][0]["cosine"]) == (200, 1.0)
        assert open_graphs(client) <= {"image", "text"}


def test_a_graph_at_rest_whose_bundle_was_replaced_is_not_opened(own, bundle_maker):
    """Its file belongs to another bundle by now; until that one is loaded, callers are asked to come again."""
    settings = own()

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="new", replace=True)
        assert all([graph.rest(0) for graph in old.graphs.values()])
        with pytest.raises(Overloaded, match="being replaced") as refused:
            await old.batchers["text"].run(WORD)
        shutil.rmtree(settings.bundles_dir / "colours-int8")
        with pytest.raises(Overloaded, match="being replaced"):
            await old.batchers["text"].run(WORD)
        return refused.value.reason

    assert at(settings, scenario) == "replaced"


def test_a_bundle_that_was_replaced_by_a_broken_one_is_not_put_to_rest(own, bundle_maker):
    settings = own(idle_unload_s=1e-9)

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="broken", replace=True)
        (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.rest()
            await hub.renew()
        assert not old.rests
        assert hub.ready
        return (await old.batchers["text"].run(WORD)).outputs["text_embeds"].tolist()

    assert at(settings, scenario) == [[1, 0, 0]]


@pytest.mark.parametrize("gone", [False, True])
def test_a_graph_at_rest_that_lost_its_files_is_told_until_there_are_some(own, bundle_maker, gone):
    """Its callers are not asked to come again, and who asks whether the service is ready hears why not."""
    settings = own(idle_unload_s=1e-9)
    folder = settings.bundles_dir / "colours-int8"

    async def scenario(hub):
        old = hub.get(None, "embed")
        await hub.rest()
        assert old.rests
        if gone:
            shutil.rmtree(folder)
        else:
            bundle_maker(settings.bundles_dir, note="broken", replace=True)
            (folder / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.renew()
        assert not hub.ready
        why = hub.failed["colours-int8"]
        assert ("no bundle at" if gone else "text.onnx") in why
        with pytest.raises(BundleInvalid, match="was at rest, and the new one is not loaded") as refused:
            await old.batchers["text"].run(WORD)
        assert why in str(refused.value)
        bundle_maker(settings.bundles_dir, note="old", replace=not gone)  # the same as before
        await hub.renew()
        answer = await hub.get(None, "embed").batchers["text"].run(WORD)
        assert hub.ready
        return answer.outputs["text_embeds"].tolist()

    assert at(settings, scenario) == [[1, 0, 0]]


def test_where_nobody_looks_for_changes_a_replaced_graph_at_rest_asks_for_a_restart(own, bundle_maker):
    settings = own(idle_unload_s=1e-9, reload_s=0)

    async def scenario(hub):
        await hub.rest()
        bundle_maker(settings.bundles_dir, note="new", replace=True)
        with pytest.raises(BundleInvalid, match="restart the service"):
            await hub.get(None, "embed").batchers["text"].run(WORD)

    at(settings, scenario)


class Graph:
    """A session that says whether it was asked while it ran."""

    def __init__(self, during):
        self.during = during

    def run(self, feeds):
        self.during()
        return {"y": feeds["x"]}


def test_resting_opens_when_asked_and_never_rests_while_it_runs():
    now, opened, closed, rested = [0.0], [], [], []
    resting = Resting(
        lambda: Graph(lambda: rested.append(resting.rest(0))), opened.append, lambda: closed.append(1), lambda: now[0]
    )
    assert len(opened) == 1
    now[0] = 9.0
    assert not resting.rest(10)
    assert resting.run({"x": 1}) == {"y": 1}
    assert rested == [False]
    now[0] = 18.0
    assert not resting.rest(10)
    now[0] = 19.0
    assert resting.rest(10)
    assert not resting.rest(10)  # it rests already
    assert (len(opened), len(closed)) == (1, 1)
    assert resting.run({"x": 2}) == {"y": 2}
    assert len(opened) == 2
