"""The log of a real `calmclip serve` in JSON: every line of standard error, whatever wrote it."""

import json
import logging
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from calmclip.service.logs import log_lines
from tests.asking import raw, until
from tests.process import serving

COMMON = ["time", "level", "logger", "message"]
ACCESS = ["id", "method", "path", "status", "ms", "task", "model", "problem", "key", "trace_id", "stages_ms"]
# An endpoint of another package, which goes wrong in each way that Python reports.
FAULTY = """
import asyncio, gc, threading, warnings
from calmclip.service.endpoints import Endpoint

class Unraisable:
    def __del__(self):
        raise ValueError("in a finalizer")

def fail(where):
    raise ValueError(f"in {where}\\nsecond line")

async def forgotten():
    fail("a task")

@Endpoint("GET", "/v1/faulty", task="other", scope="read")
async def faulty(asked):
    warnings.warn("beware\\nof this", UserWarning)
    thread = threading.Thread(target=fail, args=["a thread"], name="stray")
    thread.start()
    thread.join()
    Unraisable()
    asyncio.get_running_loop().call_soon(fail, "a callback")
    asyncio.get_running_loop().create_task(forgotten())
    await asyncio.sleep(0.05)
    gc.collect()
    fail("a handler \\udcff")
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    package = tmp_path / "faulty-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[calmclip.endpoints]\nGET /v1/faulty = faulty\n")
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_every_line_is_one_json_object_with_time_level_logger_and_message(bundles, tmp_path, picture, faulty):
    begun = datetime.now(UTC) - timedelta(milliseconds=1)
    with serving(bundles, tmp_path / "data", CALMCLIP_LOG="json") as (process, client, file):
        assert client.post("/v1/classify?labels=red", **raw(picture("red"))).status_code == 200
        assert client.post("/v1/classify?labels=red", **raw(b"no picture")).status_code == 415
        assert client.get("/no%0Apath").status_code == 404
        assert client.get("/v1/faulty", headers={"x-request-id": "bad"}).status_code == 500
        late = raw(picture("red"), **{"x-request-deadline-ms": "0.001", "x-request-id": "late"})
        assert client.post("/v1/classify?labels=red", **late).status_code in (503, 504)
        until(lambda: "late" in file.read_text())
        process.terminate()
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        assert list(line)[:4] == COMMON
        assert all(isinstance(line[name], str) and line[name] for name in COMMON)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert begun <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
        more = list(line)[4:]
        assert more == (ACCESS if line["logger"] == "calmclip.access" else ["traceback"] if "traceback" in line else [])

    requests = {line["path"]: line for line in lines if line["logger"] == "calmclip.access" and line["id"] != "late"}
    levels = {path: (line["status"], line["level"]) for path, line in requests.items()}
    assert levels["/no\npath"] == (404, "INFO")
    assert levels["/v1/classify"] == (415, "INFO")
    assert levels["/v1/faulty"] == (500, "ERROR")
    (answered,) = [line for line in lines if line.get("path") == "/v1/classify" and line["status"] == 200]
    assert (answered["task"], answered["model"], answered["level"]) == ("classify", "colours-int8", "INFO")
    assert answered["stages_ms"].keys() >= {"read", "decode", "infer"}
    (refused,) = [line for line in lines if line.get("id") == "late"]
    assert (refused["level"], refused["problem"]) in [("WARNING", "overloaded"), ("WARNING", "deadline-exceeded")]

    (failed,) = [line for line in lines if line["message"] == "request bad failed"]
    assert (failed["level"], failed["logger"]) == ("ERROR", "calmclip")
    assert "in a handler" in failed["traceback"]
    told = {(line["logger"], line["level"]) for line in lines}
    assert {("uvicorn.error", "INFO"), ("py.warnings", "WARNING"), ("asyncio", "ERROR")} <= told
    traces = [line["traceback"] for line in lines if "traceback" in line]
    for place in ("a thread", "a callback", "a task", "a finalizer"):
        assert [trace for trace in traces if f"in {place}" in trace], place
    assert [line for line in lines if line["logger"] == "py.warnings" and "beware\nof this" in line["message"]]


@pytest.mark.parametrize("wrong", [{"CALMCLIP_THREADS": "many"}, {"CALMCLIP_LOAD": "nothing"}])
def test_a_start_that_fails_says_so_in_one_line_of_the_same_form(bundles, tmp_path, wrong):
    environment = {**os.environ, "CALMCLIP_DATA_DIR": str(tmp_path), "CALMCLIP_LOG": "json", **wrong}
    command = [sys.executable, "-m", "calmclip.models.cli", "serve", "--bundles", str(bundles)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    (line,) = map(json.loads, done.stderr.splitlines())
    assert list(line) == COMMON
    assert (line["level"], line["logger"]) == ("CRITICAL", "calmclip")
    assert next(iter(wrong.values())) in line["message"]


def test_a_name_that_is_not_utf8_is_still_a_line():
    record = logging.LogRecord("calmclip", logging.INFO, __file__, 1, "a\nb %s", ("\udcff",), None)
    text = log_lines("json").format(record)
    assert "\n" not in text
    assert json.loads(text)["message"] == "a\nb \udcff"
