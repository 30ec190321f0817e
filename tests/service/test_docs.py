"""The service's pages list every route, setting, metric and problem, and no other; the examples of all pages run."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from calmclip.models.cli import main
from calmclip.models.ops import breakeven
from calmclip.models.ops.library import find
from calmclip.service import endpoints, resources
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENDPOINTS
from calmclip.service.metrics import Metrics
from calmclip.service.problems import PROBLEMS
from calmclip.service.schemas import Answer, PictureBody
from calmclip.service.settings import Slo
from tests.asking import raw
from tests.test_compose import settings_there

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "export" / "samples"
USING, CLIENTS, OPERATING, README = (
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("docs/using.md", "docs/clients.md", "docs/operating.md", "README.md")
)


def table(page: str, title: str) -> dict[str, list[str]]:
    """The table under a heading: first cell without backquotes -> the other cells."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


def test_settings():
    documented = table(OPERATING, "Settings")
    defaults = settings_there()
    assert documented.keys() == defaults.keys()
    for name, default in defaults.items():
        if default not in ((), None):  # the page describes these defaults in words
            text = documented[name][0].strip("`")
            assert TypeAdapter(type(default)).validate_python(text) == default, name


def test_metrics(client, picture):
    documented = {name: set(row[0].split(", ")) - {""} for name, row in table(OPERATING, "Metrics").items()}
    metrics = Metrics(Slo())
    families = {}
    for family in metrics.registry.collect():
        if family.name.startswith(("calmclip_", "gen_ai_")):
            families[family.name + ("_total" if family.type == "counter" else "")] = family
    assert documented.keys() == families.keys()
    for path in ("/v1/detect?labels=red", "/v1/detect"):
        client.post(path, **raw(picture("red")))
    client.put("/v1/collections/c", json={})
    client.post("/v1/embed", json={"inputs": [{"text": "red"}]})
    scraped = set()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name in documented and family.samples:
            assert set(family.samples[0].labels) - {"le"} == documented[name], name
            scraped.add(name)
    limited = resources.memory(resources.CGROUPS) is not None
    library = find()
    absent = set() if library is None or breakeven.left(library) else {"calmclip_op_left"}
    absent |= set() if limited else {name for name in documented if name.startswith("calmclip_memory_")}
    assert scraped == documented.keys() - absent


def test_problems(client):
    documented = table(USING, "Problems")
    assert {slug: int(row[0]) for slug, row in documented.items()} == {p.slug: p.status for p in PROBLEMS.values()}
    for problem in PROBLEMS.values():
        assert problem.title in client.get(f"/problems/{problem.slug}").text


def test_routes(client):
    paths = client.get("/openapi.json").json()["paths"]
    declared = {f"{method.upper()} {path}" for path, verbs in paths.items() for method in verbs}
    assert set(table(USING, "Routes")) == set(ENDPOINTS.names()) == declared


@pytest.mark.parametrize("block", [*blocks(USING, "bash"), *blocks(CLIENTS, "bash"), *blocks(README, "bash")])
def test_examples_run(client, block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in block.splitlines():
        if line.startswith(".venv/bin/calmclip "):
            words = shlex.split(line.replace("http://127.0.0.1:8080", str(client.base_url)))
            assert main(words[1:]) == 0, capsys.readouterr().err
            continue
        answer = curl(client, line)
        assert answer.is_success, f"{line}: {answer.text}"


def test_the_python_example_runs(client, monkeypatch, capsys):
    (block,) = blocks(CLIENTS, "python")
    monkeypatch.chdir(ASSETS)
    exec(block.replace("http://127.0.0.1:8080", str(client.base_url)), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["['indoors', 'on grass']", "3"]
    assert lines[6:8] == ["['cat']", "['cat', 'sand']"]
    assert lines[8:11] == ["2", "2 None", "this"]
    assert lines[11:13] == ["['cat']", "False"]
    assert lines[13] == "('sofa', False) []"
    assert lines[14].endswith(" False")
    assert lines[15].startswith("404 collection-not-found ")


def test_the_python_example_of_stored_classifiers_runs(bundles, monkeypatch, capsys, tmp_path):
    (block,) = blocks((ROOT / "docs/classifiers.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(ASSETS)
    block = block.replace("models/bundles/mini-int8", str(bundles / "colours-int8"))
    exec(block.replace("data/classifiers", str(tmp_path / "classifiers")), {})
    assert capsys.readouterr().out == "cat\n"


def test_the_python_example_of_the_readme_runs(bundles, monkeypatch, capsys):
    (block,) = blocks(README, "python")
    monkeypatch.chdir(ROOT)
    exec(block.replace("models/bundles/mini-int8", str(bundles / "colours-int8")), {})
    assert {line.split()[-2] for line in capsys.readouterr().out.splitlines()} == {"cat", "dog"}


def test_the_endpoint_of_the_services_page_registers(monkeypatch):
    (block,) = blocks((ROOT / "service/README.md").read_text(encoding="utf-8"), "python")
    ENDPOINTS.load()
    monkeypatch.setattr(ENDPOINTS, "_plugins", {**ENDPOINTS._plugins})
    body, answer = type("ChannelBody", (PictureBody,), {}), type("ChannelAnswer", (Answer,), {})
    exec(block, {**vars(endpoints), "Asked": Asked, "ChannelBody": body, "ChannelAnswer": answer})
    assert (ENDPOINTS.get("POST /v1/channel").body, ENDPOINTS.get("POST /v1/channel").answer) == (body, answer)


@pytest.mark.parametrize(
    ("page", "schemas"), [(USING, ["ClassifyBody", "EmbedBody"]), (README, ["ClassifyAnswer"])], ids=["using", "readme"]
)
def test_json_examples_match_the_schema(client, page, schemas):
    components = client.get("/openapi.json").json()["components"]
    for block, schema in zip(blocks(page, "json"), schemas, strict=True):
        jsonschema.validate(json.loads(block), {"components": components, "$ref": f"#/components/schemas/{schema}"})


def file(name: str) -> Path:
    """The file that an example names, from the root or from the folder of samples."""
    return next(folder / name for folder in (ROOT, ASSETS) if (folder / name).exists())


def curl(client, line: str):
    """The options of curl that the examples use."""
    program, *words = shlex.split(line.replace("mini-int8", "colours-int8"))
    assert program == "curl"
    method, url, headers, body, form = "GET", "", {}, None, []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            url = word
        elif word == "-N":  # lines as they come
            continue
        elif word == "-X":
            method = words.pop(0)
        elif word == "-H":
            name, value = words.pop(0).split(": ")
            headers[name] = value
        elif word in ("-d", "--data-binary"):
            value = words.pop(0)
            body = file(value[1:]).read_bytes() if value.startswith("@") else value
        elif word == "-F":
            name, value = words.pop(0).split("=", 1)
            sent = (value, file(value[1:]).read_bytes()) if value.startswith("@") else (None, value)
            form.append((name, sent))
        else:
            pytest.fail(f"the examples use curl {word}; teach it to this test")
    if method == "GET" and (body is not None or form):
        method = "POST"
    split = urlsplit(url)
    assert split.netloc == "127.0.0.1:8080"
    path = f"{split.path}?{split.query}" if split.query else split.path
    return client.request(method, path, headers=headers, content=body, files=form or None)
