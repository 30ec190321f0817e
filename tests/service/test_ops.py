"""The op library in the service: its setting, its line in the log and its metric."""

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from calmclip.models.cli import main
from calmclip.models.ops import breakeven, build
from calmclip.models.ops.library import mask
from calmclip.models.runtime.session import SessionOptions
from calmclip.service import hub


@pytest.fixture
def observe(settings, serve, monkeypatch, caplog):
    """Serve with a setting -> the log line about the library, the labels of `calmclip_ops_info`, the libraries that
    prepare pictures, and the options of the sessions."""
    sessions: list[SessionOptions] = []
    bundles = []

    def session(path, graph, options):
        sessions.append(options)
        return real(path, graph, options)

    def bundle(*args, **options):
        bundles.append(opened(*args, **options))
        return bundles[-1]

    real, opened = hub.Session, hub.Bundle
    monkeypatch.setattr(hub, "Session", session)
    monkeypatch.setattr(hub, "Bundle", bundle)

    def ask(ops: str, **more):
        with caplog.at_level(logging.INFO, "calmclip"), serve(settings(ops=ops, **more)) as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
        families = list(families)
        ask.left = {s.labels["op"] for family in families for s in family.samples if s.name == "calmclip_op_left"}
        (info,) = [s for family in families for s in family.samples if s.name == "calmclip_ops_info"]
        assert info.value == 1
        lines = [m for m in caplog.messages if m.startswith("op library") or "own functions" in m]
        assert len(lines) == 1
        return (
            lines[0],
            info.labels,
            [b.image(role).library for b in bundles for role in ("image", "regions")],
            sessions,
        )

    return ask


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_with_the_library(observe, library, mode):
    line, labels, prepare, sessions = observe(mode)
    assert line.startswith(f"op library {library.sha256[:12]}, ")
    assert labels["sha256"] == library.sha256
    sets = labels["isa"].split(",")
    assert line.endswith(", ".join(sets))
    assert {*sets} <= {"scalar", "avx2", "neon", "avx512", "vnni", "vbmi"}
    assert prepare == [library] * 2
    assert {options.ops for options in sessions} == {mode}


@pytest.mark.parametrize(("mode", "left"), [("auto", {"QuantAdd", "pictures"}), ("all", set())])
def test_left_operators_are_named(observe, library, monkeypatch, caplog, mode, left):
    monkeypatch.setattr(breakeven, "KERNELS", {"QuantAdd": "quant_add", "pictures": "resize_rows"})
    monkeypatch.setattr(
        breakeven, "read", lambda library: breakeven.Measured("", "", {"QuantAdd": 0.4, "pictures": 0.4})
    )
    _, _, prepare, sessions = observe(mode)
    lines = [m for m in caplog.messages if m.startswith("operators left")]
    assert lines == ["operators left to ONNX Runtime, which is faster here: QuantAdd, pictures"][: len(left)]
    assert observe.left == left
    assert prepare == [None if left else library] * 2
    assert {options.ops for options in sessions} == {mode}


def test_masked_instruction_sets_are_neither_used_nor_named(observe, library):
    masked = tuple({kernel.isa for kernel in library.kernels} - {"scalar"})
    try:
        line, labels, *_ = observe("auto", ops_without=masked)
    finally:
        mask(())
    assert labels["isa"] == "scalar"
    assert line.endswith(", scalar")


def test_off_holds_for_pictures_and_graphs(observe, library, monkeypatch):
    looked: list[object] = []
    monkeypatch.setattr("calmclip.models.ops.library.look", lambda folder: looked.append(folder) or library)
    line, labels, prepare, sessions = observe("off")
    assert not looked
    assert line == "CALMCLIP_OPS=off: bundles run their own functions"
    assert labels == {"sha256": "", "isa": "none"}
    assert prepare == [None] * 2
    assert {options.ops for options in sessions} == {"off"}


def test_a_missing_library_is_logged_once(observe, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    line, labels, prepare, _ = observe("auto")
    assert line == "no op library is built: bundles run their own functions"
    assert labels["isa"] == "none"
    assert prepare == [None] * 2


def test_a_required_library_that_is_missing_stops_the_start(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr("calmclip.service.cli._listen", lambda *_: pytest.fail("it listens"))
    monkeypatch.setenv("CALMCLIP_OPS", "required")
    assert main(["serve", "--bundles", str(bundles)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no op library is built, and CALMCLIP_OPS=required. Run 'calmclip ops build'" in error


def test_a_required_library_that_is_missing_makes_the_app_not_ready(settings, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with serve(settings(ops="required"), ready=False) as client:
        for _ in range(200):
            answer = client.get("/readyz")
            if answer.json()["failed"]:
                break
        assert answer.status_code == 503
        assert "no op library is built" in answer.json()["failed"]["bundles"]
