"""Keys: every route except health needs a key with its scope, and no key appears in a log, metric or answer."""

import asyncio
import hashlib
import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.service import keys
from calmclip.service.app import create_app
from calmclip.service.client import Client, Forbidden, Unauthorized
from calmclip.service.indexing import index
from calmclip.service.logs import log_lines
from calmclip.service.routes.catalog import WEB
from calmclip.service.scopes import SCOPES

# The routes with the scope "write", listed by hand; the other routes have the scope "read".
WRITES = {
    "PUT /v1/collections/{name}", "DELETE /v1/collections/{name}", "POST /v1/collections/{name}/items",
    "DELETE /v1/collections/{name}/items", "PUT /v1/classifiers/{name}", "DELETE /v1/classifiers/{name}",
    "POST /v1/classifiers/{name}/calibrate", "POST /v1/classifiers/{name}/fit", "PUT /v1/collections/{name}/bank",
}  # fmt: skip
HEALTH = {"GET /healthz", "HEAD /healthz", "GET /readyz", "HEAD /readyz", "GET /v2/health/live", "GET /v2/health/ready"}
PAGE_FILES = [file.name for file in WEB.iterdir() if file.suffix in (".js", ".css")]
PAGE = {f"{verb} /{file}" for verb in ("GET", "HEAD") for file in ("", "docs", *PAGE_FILES)}
ROOT = Path(keys.__file__).parents[1]
CHALLENGE = 'Bearer realm="calmclip"'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def ask(app, *requests: httpx.Request) -> list[httpx.Response]:
    """Answers without a server and without loaded bundles: keys are checked before both."""

    async def go() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return [await client.send(request) for request in requests]

    return asyncio.run(go())


def operations(routes) -> dict[str, str]:
    """Verb and path of every route -> its path without placeholders."""
    paths = {}
    for route in routes:
        if inner := getattr(route, "original_router", None):  # newer FastAPI versions hold an included router there
            paths |= operations(inner.routes)
        else:
            paths |= {f"{verb} {route.path}": re.sub(r"{\w+}", "x", route.path) for verb in route.methods}
    return paths


def test_every_route_but_health_and_the_page_needs_a_key(settings, file):
    secrets = {scope: keys.add(file, scope, [scope]) for scope in SCOPES}
    app = create_app(settings(keys=file))
    routes = operations(app.routes)
    assert {"GET /openapi.json", "GET /metrics", *WRITES, *HEALTH} <= routes.keys()
    assert len(routes) > 35
    others = {"GET nothing": "/nothing", "POST page": "/", "OPTIONS any": "/v1/models", "GET break": "/metrics%0A"}
    for name, path in {**routes, **others}.items():
        verb = name.split()[0]
        needed = "write" if name in WRITES or name.split()[1] in ("page", "any") else "read"
        needed = "metrics" if path.startswith("/metrics") else needed
        headers = [{}, *map(bearer, ("wrong", *secrets.values()))]
        bare, wrong, *known = ask(app, *(httpx.Request(verb, f"http://x{path}", headers=sent) for sent in headers))
        if name in HEALTH | PAGE:
            assert bare.status_code in (200, 503, 400), name  # "not ready" is 400 under /v2
            continue
        for answer in (bare, wrong):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, CHALLENGE), name
        for scope, answer in zip(secrets, known, strict=True):
            if scope == needed:
                assert answer.status_code not in (401, 403), name
            else:
                assert answer.status_code == 403, (name, scope)
                assert (
                    answer.headers["www-authenticate"] == f'{CHALLENGE}, error="insufficient_scope", scope="{needed}"'
                )


def test_problems_and_the_two_headers(settings, file):
    secret = keys.add(file, "reader", ["read"])
    app = create_app(settings(keys=file))

    def status(*headers: tuple[str, str]) -> int:
        return ask(app, httpx.Request("GET", "http://x/v1/models", headers=list(headers)))[0].status_code

    for good in ([("X-API-Key", secret)], [("Authorization", f"bearer  {secret}")],
                 [("X-API-Key", secret), ("Authorization", f"Bearer {secret}")]):  # fmt: skip
        assert status(*good) == 200, good
    digest = hashlib.sha256(secret.encode()).hexdigest()
    for bad in ([("Authorization", secret)], [("Authorization", f"Basic {secret}")], [("X-API-Key", digest)],
                [("X-API-Key", secret[:-1])], [("X-API-Key", secret), ("Authorization", "Bearer other")],
                [("X-API-Key", "")], [("Authorization", "Bearer ")]):  # fmt: skip
        assert status(*bad) == 401, bad
    (answer,) = ask(app, httpx.Request("PUT", "http://x/v1/collections/x", headers=bearer(secret)))
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    fields = (problem["type"], problem["status"], problem["instance"])
    assert fields == ("/problems/forbidden", 403, "/v1/collections/x")
    assert problem["detail"] == "the key 'reader' is for read; this needs one for write"
    assert problem["request_id"] == answer.headers["x-request-id"]
    (answer,) = ask(app, httpx.Request("GET", "http://x/v1/models"))
    assert answer.json()["type"] == "/problems/unauthorized"


def test_a_body_is_not_read_without_a_key(settings, serve, file):
    keys.add(file, "reader", ["read"])
    with serve(settings(keys=file, limits={"body_bytes": 1024})) as client:
        answer = client.post("/v1/embed", content=b"x" * (2 << 20), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["connection"]) == (401, "close")


def test_the_specification_says_which_operations_need_a_key(settings, file):
    assert "security" not in json.dumps(create_app(settings()).openapi())
    keys.add(file, "reader", ["read"])
    spec = create_app(settings(keys=file)).openapi()
    assert spec["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            is_open = f"{verb.upper()} {path}" in HEALTH
            assert ("security" in operation) != is_open, (verb, path)
            assert ({"401", "403"} <= operation["responses"].keys()) != is_open, (verb, path)


def test_the_file_is_read_again_when_it_changes(settings, file, caplog):
    first = keys.add(file, "first", ["read"])
    app = create_app(settings(keys=file))

    def status(secret: str) -> int:
        return ask(app, httpx.Request("GET", "http://x/v1/models", headers=bearer(secret)))[0].status_code

    assert status(first) == 200
    second = keys.add(file, "second", ["read"])
    assert (status(first), status(second)) == (200, 200)
    keys.remove(file, "first")
    assert (status(first), status(second)) == (401, 200)
    content = file.read_bytes()
    with caplog.at_level(logging.WARNING, "calmclip"):
        file.write_text(json.dumps({"keys": [{"name": "x", "sha256": second, "scopes": ["read"]}]}))
        assert (status(second), status(second)) == (200, 200)
        file.unlink()
        assert status(second) == 200
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 2  # once for each change
    assert second not in caplog.text
    file.write_bytes(content.replace(b'"second"', b'"renamed"'))
    assert status(second) == 200
    file.write_text('{"keys": []}')
    assert status(second) == 401


def test_no_key_appears_in_the_log_the_metrics_or_an_answer(settings, serve, file, caplog, picture):
    secret, other = keys.add(file, "both", ["read", "metrics"]), "calmclip_" + "guess" * 9
    caplog.set_level(logging.DEBUG)
    answers = []
    with serve(settings(keys=file)) as client:
        for key in (secret, other):
            for request in ("GET /v1/models", "GET /no", "PUT /v1/collections/x", "GET /metrics"):
                for headers in (bearer(key), {"X-API-Key": key}):
                    answer = client.request(*request.split(), headers=headers)
                    answers.append(answer.text + str(answer.headers))
    lines = "\n".join(log_lines("json").format(record) for record in caplog.records)
    text = caplog.text + lines + "".join(answers) + file.read_text()
    assert "calmclip_requests_total" in text
    assert "calmclip.access" in text
    assert '"key":"both"' in lines  # the log names the key
    assert secret not in text
    assert other not in text
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert digest not in caplog.text + lines + "".join(answers)


def test_clients_send_a_key(settings, serve, file, tmp_path, picture, monkeypatch, capsys):
    secret, reader = keys.add(file, "both", ["read", "write"]), keys.add(file, "reader", ["read"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "red.png").write_bytes(picture("red"))
    alone = settings(keys=file, data_dir=tmp_path / "alone")
    assert index(folder, "photos", settings=alone)["added"] == 1  # without a service no key is needed
    with serve(settings(keys=file)) as http:
        url = str(http.base_url)
        with Client(url, key=reader) as client:
            assert [model.name for model in client.models()] == ["colours-int8"]
            with pytest.raises(Forbidden, match="needs one for write"):
                client.create_collection("x")
        with Client(url) as client, pytest.raises(Unauthorized, match="a key is needed"):
            client.models()
        monkeypatch.setenv("CALMCLIP_API_KEY", secret)
        assert main(["index", str(folder), "--collection", "photos", "--url", url]) == 0
        monkeypatch.setenv("CALMCLIP_API_KEY", reader)
        assert main(["index", str(folder), "--collection", "photos", "--url", url]) == 2
    output = capsys.readouterr()
    assert "needs one for write" in output.err
    assert secret not in output.out + output.err
    assert reader not in output.out + output.err


def test_the_command_keys(file, monkeypatch, capsys):
    monkeypatch.setenv("CALMCLIP_KEYS", str(file))
    os.umask(mask := os.umask(0))  # the mode of the file must not depend on the mask
    before = os.umask(0)
    try:
        assert main(["keys", "add", "prometheus", "--scope", "metrics"]) == 0
    finally:
        os.umask(before)
    assert before == mask
    secret = capsys.readouterr().out.strip()
    assert re.fullmatch(r"calmclip_[\w-]{43}", secret)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (entry,) = json.loads(file.read_text())["keys"]
    assert entry == {
        "name": "prometheus", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": ["metrics"],
    }  # fmt: skip
    assert main(["keys", "--json", "add", "ci", "--scope", "read", "--scope", "write"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] != secret
    assert main(["keys", "--json", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "keys": [{"name": "prometheus", "scopes": ["metrics"]}, {"name": "ci", "scopes": ["read", "write"]}]
    }
    assert main(["keys", "list", "--json", "--file", str(file)]) == 0  # the same after the verb
    assert len(json.loads(capsys.readouterr().out)["keys"]) == 2
    assert main(["keys", "remove", "prometheus"]) == 0
    assert capsys.readouterr().out.split() == ["ci", "read", "write"]
    assert main(["keys", "add", "third", "--scope", "read", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "third"
    assert main(["keys", "remove", "third", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"keys": [{"name": "ci", "scopes": ["read", "write"]}]}
    for wrong, word in ((["add", "ci", "--scope", "read"], "already"), (["add", "a b", "--scope", "read"], "is not a"),
                        (["remove", "x"], "no key 'x'")):  # fmt: skip
        assert main(["keys", *wrong]) == 2
        assert word in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    monkeypatch.delenv("CALMCLIP_KEYS")
    assert main(["keys", "list"]) == 2
    assert "--file" in capsys.readouterr().err


def test_concurrent_changes_of_the_file_are_all_kept(file):
    """Four processes start together, then add and remove keys as fast as possible."""
    keys.add(file, "first", ["read"])
    script = (
        "import sys; from pathlib import Path; from calmclip.service import keys\n"
        "file, me = Path(sys.argv[1]), sys.argv[2]\n"
        "print('here', flush=True); sys.stdin.readline()\n"
        "for i in range(10):\n"
        "    keys.add(file, f'{me}-{i}', ['read'])\n"
        "    if i % 2: keys.remove(file, f'{me}-{i}')\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, file, name], stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT)
        for name in "abcd"
    ]
    for process in processes:
        assert process.stdout.readline() == "here\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0] * 4
    for process in processes:
        process.communicate()
    remaining = {f"{name}-{i}" for name in "abcd" for i in range(0, 10, 2)}
    assert {key.name for key in keys.read(file)} == {"first", *remaining}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_link_stays_a_link(file, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(file)
    keys.add(link, "a", ["read"])
    assert link.is_symlink()
    assert [key.name for key in keys.read(file)] == ["a"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "cannot be read"),
        ("calmclip_secret", "JSON"),
        ('{"keys": [{"name": "a", "sha256": "calmclip_secret", "scopes": ["read"]}]}', "sha256"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": []}]}), "scopes"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": ["all"]}]}), "scopes"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": ["read"]}] * 2}), "twice"),
    ],
)
def test_an_invalid_file_stops_the_start(settings, file, text, word):
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadRequest, match=word) as error:
        create_app(settings(keys=file))
    assert "calmclip_secret" not in str(error.value)


def test_metrics_at_their_own_port(settings, file):
    secret = keys.add(file, "prometheus", ["metrics"])
    app = create_app(settings(metrics_port=9090))
    paths = [f"http://x:{port}/{path}" for port in (8080, 9090) for path in ("metrics", "healthz", "v1/models")]
    answers = ask(app, *(httpx.Request("GET", path) for path in paths))
    assert [each.status_code for each in answers] == [404, 200, 200, 200, 200, 404]
    assert answers[0].json()["type"] == "/problems/not-found"
    assert "calmclip_requests_total" in answers[3].text
    (answer,) = ask(app, httpx.Request("GET", "http://x:8080/metrics%0A"))  # the router matches it as /metrics
    assert answer.status_code == 404
    assert "/metrics" not in app.openapi()["paths"]
    closed = create_app(settings(metrics_port=9090, keys=file))
    metrics = "http://x:9090/metrics"
    answers = ask(closed, httpx.Request("GET", metrics), httpx.Request("GET", metrics, headers=bearer(secret)))
    assert [each.status_code for each in answers] == [401, 200]
