"""service/README.md names every route, setting, metric and problem, none that does not exist, and its examples run."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from calmclip import service
from calmclip.service.endpoints import ENDPOINTS
from calmclip.service.metrics import Metrics
from calmclip.service.problems import PROBLEMS
from calmclip.service.settings import Settings
from tests.asking import raw
from tests.test_compose import settings_there

README = (Path(service.__file__).parent / "README.md").read_text(encoding="utf-8")
ASSETS = Path(__file__).parents[2] / "export" / "samples"


def table(title: str) -> dict[str, list[str]]:
    """First cell without backquotes -> the other cells, of the table under a heading."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def test_settings():
    documented = table("Settings")
    there = settings_there()
    assert documented.keys() == there.keys()
    for name, default in there.items():
        if default not in ((), None):  # "all" and "under the data directory" are said in words
            assert type(default)(documented[name][0].strip("`")) == default, name


def test_metrics(client, picture):
    documented = {name: {one for one in row[0].split(", ") if one} for name, row in table("Metrics").items()}
    metrics = Metrics(Settings())
    there = {}
    for family in metrics.registry.collect():
        if family.name.startswith("calmclip_"):
            there[family.name + ("_total" if family.type == "counter" else "")] = family
    assert documented.keys() == there.keys()
    for path in ("/v1/detect?labels=red", "/v1/detect"):
        client.post(path, **raw(picture("red")))
    client.put("/v1/collections/c", json={})
    seen = set()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name in documented and family.samples:
            assert set(family.samples[0].labels) - {"le"} == documented[name], name
            seen.add(name)
    assert seen == documented.keys()


def test_problems(client):
    documented = table("Problems")
    assert {slug: int(row[0]) for slug, row in documented.items()} == {p.slug: p.status for p in PROBLEMS.values()}
    for problem in PROBLEMS.values():
        assert problem.title in client.get(f"/problems/{problem.slug}").text


def test_routes(client):
    paths = client.get("/openapi.json").json()["paths"]
    there = {f"{method.upper()} {path}" for path, verbs in paths.items() for method in verbs}
    assert set(table("Routes")) == set(ENDPOINTS.names()) == there


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split("/v1/")[1].split()[0])
def test_examples_run(client, block):
    for line in block.splitlines():
        answer = curl(client, line)
        assert answer.is_success, f"{line}: {answer.text}"


def test_the_python_example_runs(client, monkeypatch, capsys):
    (block,) = blocks("python")
    monkeypatch.chdir(ASSETS)
    exec(block.replace("http://127.0.0.1:8080", str(client.base_url)), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "3"
    assert lines[3:5] == ["['cat']", "['cat', 'sand']"]
    assert lines[5] == "this"
    assert lines[6].startswith("404 collection-not-found ")


def test_json_examples_fit_the_schema(client):
    spec = client.get("/openapi.json").json()
    for block in blocks("json"):
        schema = {"components": spec["components"], "$ref": "#/components/schemas/ClassifyBody"}
        jsonschema.validate(json.loads(block), schema)


def curl(client, line: str):
    """As much of curl as the examples use."""
    program, *words = shlex.split(line.replace("mini-int8", "colours-int8"))
    assert program == "curl"
    method, url, headers, body, form = "GET", "", {}, None, []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            url = word
        elif word == "-X":
            method = words.pop(0)
        elif word == "-H":
            name, value = words.pop(0).split(": ")
            headers[name] = value
        elif word in ("-d", "--data-binary"):
            value = words.pop(0)
            body = (ASSETS / value[1:]).read_bytes() if value.startswith("@") else value
        elif word == "-F":
            name, value = words.pop(0).split("=", 1)
            file = ASSETS / value[1:]
            form.append((name, (file.name, file.read_bytes()) if value.startswith("@") else (None, value)))
        else:
            pytest.fail(f"the examples use curl {word}; teach it to this test")
    if method == "GET" and (body is not None or form):
        method = "POST"
    split = urlsplit(url)
    assert split.netloc == "127.0.0.1:8080"
    path = f"{split.path}?{split.query}" if split.query else split.path
    return client.request(method, path, headers=headers, content=body, files=form or None)
