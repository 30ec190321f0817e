"""Bundles in a running service: warmed up before they serve, reloaded when they change, unloaded when idle."""

import asyncio
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import calmclip.service.hub
from calmclip.models.errors import BundleInvalid, Overloaded
from calmclip.service.hub import Hub
from calmclip.service.idle_unload import UnloadableSession
from calmclip.service.metrics import Metrics
from tests import lent
from tests.asking import raw, until

WORD = {"ids": np.ones((1, 1), np.int64), "mask": np.ones((1, 1), np.int64)}  # "red"


@pytest.fixture
def make_settings(settings, bundle_maker, tmp_path):
    """A maker of settings over a new folder of bundles, which the test may change."""
    bundle_maker(tmp_path / "bundles", note="old")
    return lambda **changes: settings(bundles_dir=tmp_path / "bundles", **changes)


def at(settings, scenario):
    """Run ``scenario(hub)`` over a hub that has loaded."""

    async def main():
        hub = Hub(settings, Metrics(settings.slo), lambda: False)
        await hub.load()
        try:
            return await scenario(hub)
        finally:
            await hub.close()

    return asyncio.run(main())


def series(hub, name: str, **labels: str) -> float | None:
    return hub.metrics.registry.get_sample_value(f"calmclip_{name}", labels)


def test_every_graph_runs_before_the_hub_is_ready(make_settings, monkeypatch):
    run: set[str] = set()

    class Noted(calmclip.service.hub.Session):
        def run(self, feeds):
            run.add(self.path.stem)
            return super().run(feeds)

    monkeypatch.setattr(calmclip.service.hub, "Session", Noted)

    async def scenario(hub):
        return hub.ready, set(run), series(hub, "bundle_load_seconds", model="colours-int8")

    ready, graphs, seconds = at(make_settings(), scenario)
    assert ready
    assert graphs == {"image", "text", "regions", "dense", "detect", "levels", "enhance"}
    assert seconds > 0


def test_a_bundle_whose_graph_breaks_when_it_runs_does_not_load(make_settings, monkeypatch):
    def broken(self, feeds):
        raise BundleInvalid("the graph is broken")

    monkeypatch.setattr(calmclip.service.hub.Session, "run", broken)

    async def scenario(hub):
        return hub.ready, hub.failed

    assert at(make_settings(), scenario) == (False, {"colours-int8": "the graph is broken"})


def test_a_changed_bundle_takes_the_name_and_pending_requests_end_on_the_old_bundle(make_settings, bundle_maker):
    settings = make_settings()

    async def scenario(hub):
        old = hub.get("colours-int8", "embed")
        os.utime(settings.bundles_dir / "colours-int8" / "text.onnx")
        await hub.reload()
        assert hub.get("colours-int8", "embed") is old  # of a bundle that serves, bundle.json alone counts
        with old.lease():
            new = bundle_maker(settings.bundles_dir, note="new", replace=True)
            await hub.reload()
            assert hub.get("colours-int8", "embed").digest == new.digest != old.digest
            current = hub.get("colours-int8", "embed")
            assert hub.by_embedding(old.embedding_digest) is current  # the note does not embed
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


def test_a_changed_bundle_that_does_not_load_does_not_replace_the_old_bundle(make_settings, bundle_maker):
    settings = make_settings()

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="broken", replace=True)
        (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.reload()
        assert hub.get(None, "embed") is old
        assert hub.ready
        assert (await old.batchers["text"].run(WORD)).outputs["text_embeds"].tolist() == [[1, 0, 0]]
        failed = series(hub, "bundle_reloads_total", model="colours-int8", outcome="failed")
        bundle_maker(settings.bundles_dir, note="whole", replace=True)
        await hub.reload()
        assert hub.get(None, "embed") is not old
        return failed

    assert at(settings, scenario) == 1  # loading is tried once per version


def test_a_bundle_that_did_not_load_at_the_start_loads_after_its_repair(make_settings, bundle_maker):
    settings = make_settings()
    (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")

    async def scenario(hub):
        assert not hub.ready
        bundle_maker(settings.bundles_dir, note="whole", replace=True)
        await hub.reload()
        return hub.ready

    assert at(settings, scenario)


@pytest.mark.parametrize("serves", [False, True], ids=["at the start", "on reload"])
def test_a_repair_in_place_is_tried_and_each_failure_counts_once(make_settings, bundle_maker, caplog, serves):
    """A graph is truncated and put back; bundle.json never changes."""
    settings = make_settings()
    graph = settings.bundles_dir / "colours-int8" / "text.onnx"
    whole = graph.read_bytes()

    async def scenario(hub):
        if serves:
            bundle_maker(settings.bundles_dir, note="new", replace=True)
        rounds = []
        for content in (b"x", whole[:-1], whole):
            graph.write_bytes(content)
            for _ in range(3):
                await hub.reload()
            tries = len([r for r in caplog.records if "does not load" in r.message])
            rounds.append((tries, hub.ready, hub.get(None, "embed").bundle.manifest.source.notes if hub.ready else ""))
        return rounds, series(hub, "bundle_reloads_total", model="colours-int8", outcome="failed")

    if not serves:
        graph.write_bytes(b"")
    rounds, failed = at(settings, scenario)
    if serves:  # the old bundle serves until the new one is whole
        assert rounds == [(1, True, "old"), (2, True, "old"), (2, True, "new")]
    else:  # the first try was at the start
        assert rounds == [(2, False, ""), (3, False, ""), (3, True, "old")]
    assert failed == 2


@pytest.mark.parametrize("repair", ["stray", "link", "contents"])
def test_repairs_that_write_no_listed_file_are_noticed(make_settings, repair):
    settings = make_settings()
    folder = settings.bundles_dir / "colours-int8"
    if repair == "stray":
        (folder / "stray").mkdir()
        (folder / "stray" / "notes.txt").write_text("not listed")
    elif repair == "link":
        (folder / "text.onnx").rename(settings.bundles_dir / "aside")
        (folder / "text.onnx").symlink_to(settings.bundles_dir / "aside")
    else:
        os.utime(folder / "text.onnx", ns=(1, 1))
        whole = (folder / "text.onnx").read_bytes()
        (folder / "text.onnx").write_bytes(bytes(len(whole)))
        os.utime(folder / "text.onnx", ns=(1, 1))

    async def scenario(hub):
        await hub.reload()
        assert not hub.ready
        if repair == "stray":
            shutil.rmtree(folder / "stray")
        elif repair == "link":
            (settings.bundles_dir / "aside").replace(folder / "text.onnx")
        else:  # of the same size, in the same file, with the old time, as `rsync --inplace --times` writes it
            (folder / "text.onnx").write_bytes(whole)
            os.utime(folder / "text.onnx", ns=(1, 1))
        await hub.reload()
        return hub.ready

    assert at(settings, scenario)


def test_a_bundle_that_was_absent_at_the_start_is_loaded_when_it_appears(make_settings, bundle_maker, caplog):
    settings = make_settings(load="later-int8,colours-int8")

    async def scenario(hub):
        assert "later-int8" in hub.failed["later-int8"]
        for _ in range(3):
            await hub.reload()
        assert len([r for r in caplog.records if "later-int8 does not load" in r.message]) == 1
        (settings.bundles_dir / "later-int8").mkdir()  # a copy that has only begun
        (settings.bundles_dir / "later-int8" / "text.onnx").write_bytes(b"")
        await hub.reload()
        shutil.rmtree(settings.bundles_dir / "later-int8")
        bundle_maker(settings.bundles_dir, "later-int8")
        await hub.reload()
        return hub.ready, [loaded.name for loaded in hub.all()]

    assert at(settings, scenario) == (True, ["later-int8", "colours-int8"])


def test_no_request_fails_while_a_bundle_is_replaced(make_settings, serve, bundle_maker, picture):
    settings = make_settings(reload_s=0.05)
    with serve(settings) as client, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> tuple[int, float]:
            answer = client.post("/v1/detect?labels=red", **raw(picture("red")))
            return answer.status_code, answer.json()["detections"][0]["score"]

        answers = pool.map(ask, range(400))
        new = bundle_maker(settings.bundles_dir, note="new", replace=True)
        assert set(answers) == {(200, 1.0)}
        until(lambda: client.get("/v1/models").json()["models"][0]["digest"] == new.digest)
        assert ask(0) == (200, 1.0)


def test_an_idle_graph_is_unloaded_and_opened_again(make_settings, serve, picture):
    def open_graphs(client) -> set[str]:
        return set(re.findall(r'calmclip_graph_open{graph="(\w+)".*} 1.0', client.get("/metrics").text))

    with serve(make_settings(idle_unload_s=0.2)) as client:
        until(lambda: not open_graphs(client))
        assert client.get("/readyz").status_code == 200
        answer = client.post("/v1/classify?labels=red", **raw(picture("red")))
        assert (answer.status_code, answer.json()["labels"][0]["cosine"]) == (200, 1.0)
        assert open_graphs(client) <= {"image", "text"}


def test_an_unloaded_graph_whose_bundle_was_replaced_is_not_opened(make_settings, bundle_maker):
    """Its file belongs to the new bundle. Until that bundle is loaded, clients are told to retry."""
    settings = make_settings()

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="new", replace=True)
        assert all([graph.unload(0) for graph in old.graphs.values()])
        with pytest.raises(Overloaded, match="being replaced") as refused:
            await old.batchers["text"].run(WORD)
        shutil.rmtree(settings.bundles_dir / "colours-int8")
        with pytest.raises(Overloaded, match="being replaced"):
            await old.batchers["text"].run(WORD)
        return refused.value.reason

    assert at(settings, scenario) == "replaced"


def test_a_bundle_that_was_replaced_by_a_broken_one_is_not_unloaded(make_settings, bundle_maker):
    settings = make_settings(idle_unload_s=1e-9)

    async def scenario(hub):
        old = hub.get(None, "embed")
        bundle_maker(settings.bundles_dir, note="broken", replace=True)
        (settings.bundles_dir / "colours-int8" / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.unload_idle()
            await hub.reload()
        assert not old.unloaded
        assert hub.ready
        return (await old.batchers["text"].run(WORD)).outputs["text_embeds"].tolist()

    assert at(settings, scenario) == [[1, 0, 0]]


@pytest.mark.parametrize("gone", [False, True])
def test_an_unloaded_graph_that_lost_its_files_is_reported_until_a_bundle_loads(make_settings, bundle_maker, gone):
    """Its clients are not told to retry, and readiness names the reason."""
    settings = make_settings(idle_unload_s=1e-9)
    folder = settings.bundles_dir / "colours-int8"

    async def scenario(hub):
        old = hub.get(None, "embed")
        await hub.unload_idle()
        assert old.unloaded
        if gone:
            shutil.rmtree(folder)
        else:
            bundle_maker(settings.bundles_dir, note="broken", replace=True)
            (folder / "text.onnx").write_bytes(b"x")
        for _ in range(2):
            await hub.reload()
        assert not hub.ready
        why = hub.failed["colours-int8"]
        assert ("no bundle at" if gone else "text.onnx") in why
        with pytest.raises(BundleInvalid, match="was unloaded, and the new bundle is not loaded") as refused:
            await old.batchers["text"].run(WORD)
        assert why in str(refused.value)
        bundle_maker(settings.bundles_dir, note="old", replace=not gone)  # the same as before
        await hub.reload()
        answer = await hub.get(None, "embed").batchers["text"].run(WORD)
        assert hub.ready
        return answer.outputs["text_embeds"].tolist()

    assert at(settings, scenario) == [[1, 0, 0]]


def test_without_reloads_a_replaced_unloaded_graph_asks_for_a_restart(make_settings, bundle_maker):
    settings = make_settings(idle_unload_s=1e-9, reload_s=0)

    async def scenario(hub):
        await hub.unload_idle()
        bundle_maker(settings.bundles_dir, note="new", replace=True)
        with pytest.raises(BundleInvalid, match="restart the service"):
            await hub.get(None, "embed").batchers["text"].run(WORD)

    at(settings, scenario)


class Graph:
    """A session that calls ``during`` while it runs."""

    def __init__(self, during):
        self.during = during

    def run(self, feeds):
        self.during()
        return {"y": feeds["x"]}


def test_a_session_opens_on_demand_and_is_never_unloaded_while_it_runs():
    now, opened, closed, tried = [0.0], [], [], []
    session = UnloadableSession(
        lambda: Graph(lambda: tried.append(session.unload(0))), opened.append, lambda: closed.append(1), lambda: now[0]
    )
    assert len(opened) == 1
    now[0] = 9.0
    assert not session.unload(10)
    assert session.run({"x": 1}) == {"y": 1}
    assert tried == [False]
    now[0] = 18.0
    assert not session.unload(10)
    now[0] = 19.0
    assert session.unload(10)
    assert not session.unload(10)  # it is unloaded already
    assert (len(opened), len(closed)) == (1, 1)
    assert session.run({"x": 2}) == {"y": 2}
    assert len(opened) == 2


def test_a_graph_that_gave_its_weights_back_is_unloaded_and_opened_again(library, tmp_path):
    """Also while another session of the file is open, and after the file was cut in place."""
    path = lent.make(tmp_path / "g.onnx")
    whole = path.read_bytes()
    graph, other = (UnloadableSession(lambda: lent.opened(path)) for _ in range(2))
    answer = graph.run(lent.IDS)
    assert graph.unload(0)
    assert graph.unloaded
    assert lent.same(graph.run(lent.IDS), answer)
    os.truncate(path, 0)
    assert lent.same(graph.run(lent.IDS), answer)
    assert graph.unload(0)
    with pytest.raises(BundleInvalid):
        graph.run(lent.IDS)
    path.write_bytes(whole)
    assert lent.same(graph.run(lent.IDS), answer)
    assert lent.same(other.run(lent.IDS), answer)
    assert (graph.runs, other.runs) == (4, 1)


def test_freed_memory_returns_to_the_system_after_runs_alone(make_settings, monkeypatch):
    trims: list[str] = []
    monkeypatch.setattr(calmclip.service.hub, "trim", lambda: trims.append("trimmed"))

    async def scenario(hub):
        at_load = len(trims)
        await hub.trim()
        warm = len(trims)
        await hub.trim()
        await hub.trim()
        hub.get(None, "embed").graphs["text"].run(WORD)
        await hub.trim()
        return at_load, warm, len(trims)

    assert at(make_settings(), scenario) == (1, 2, 3)
