"""Pages of other origins: what a browser is told, and that a browser acts on it."""

import http.server
import threading

import httpx
import pytest
from playwright.sync_api import sync_playwright

from calmclip.models.errors import BadRequest
from calmclip.service import keys
from calmclip.service.app import create_app
from calmclip.service.settings import from_environment
from tests.process import installed
from tests.service.test_access import ask

HERE, ELSEWHERE = "https://app.example.org", "https://app.example.org.evil.example"
EXPOSED = {"server-timing", "x-request-id", "retry-after"}


def requests(origin: str, secret: str = "") -> list[httpx.Request]:
    """A preflight as a browser sends it, which has no key; a search; a request that is answered 422."""
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    sent = {"Origin": origin, **({"Authorization": f"Bearer {secret}"} if secret else {})}
    return [
        httpx.Request("OPTIONS", "http://x/v1/collections/c", headers=preflight),
        httpx.Request("GET", "http://x/v1/models", headers=sent),
        httpx.Request("GET", "http://x/v1/models?unknown=1", headers=sent),
    ]


def told(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def test_no_page_is_told_anything_by_default(settings):
    preflight, *others = ask(create_app(settings()), *requests(HERE))
    assert preflight.status_code == 405
    assert [told(answer) for answer in (preflight, *others)] == [{}, {}, {}]


@pytest.mark.parametrize("allowed", [(HERE, "http://localhost:3000"), ("*",)], ids=["named", "any"])
def test_a_named_origin_is_answered_with_and_without_a_key(settings, tmp_path, allowed):
    secret = keys.add(tmp_path / "keys.json", "reader", ["read"])
    app = create_app(settings(cors_origins=allowed, keys=tmp_path / "keys.json"))
    origin = "*" if allowed == ("*",) else HERE
    for key, status in ((secret, 400), ("", 401)):
        preflight, good, problem = ask(app, *requests(HERE, key))
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        assert (good.status_code, problem.status_code) == (200 if key else 401, status)
        for answer in (good, problem):
            exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
            assert {*exposed} >= EXPOSED
            assert {"server-timing", "x-request-id"} <= answer.headers.keys()
        for answer in (preflight, good, problem):
            assert answer.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in answer.headers
            assert origin == "*" or "Origin" in answer.headers["vary"]


def test_another_origin_is_refused(settings):
    app = create_app(settings(cors_origins=(HERE,)))
    for origin in (ELSEWHERE, "null", HERE.replace("https", "http"), f"{HERE}:8443"):
        preflight, *others = ask(app, *requests(origin))
        assert preflight.status_code == 400
        assert "access-control-allow-origin" not in {**told(preflight), **told(others[0]), **told(others[1])}


@pytest.mark.parametrize("wrong", ["app.example.org", "https://a.org/", "https://a.org/x", "*,https://a.org", "null",
                                   "https://*.a.org", "ftp://a.org", "https://a.org https://b.org"])  # fmt: skip
def test_what_is_no_origin_is_refused_at_the_start(monkeypatch, wrong):
    monkeypatch.setenv("CALMCLIP_CORS_ORIGINS", wrong)
    with pytest.raises(
        BadRequest, match=r"CALMCLIP_CORS_ORIGINS is .* is not an origin; expected one such as https://"
    ):
        from_environment()
    monkeypatch.setenv("CALMCLIP_CORS_ORIGINS", "HTTPS://App.Example.org, http://[::1]:3000")
    assert from_environment().cors_origins == (HERE, "http://[::1]:3000")


FETCH = """async ([url, key]) => {
  const headers = {"Content-Type": "application/json", "Authorization": `Bearer ${key}`};
  const answer = await fetch(url, {method: "POST", headers, body: '{"inputs": [{"text": "red"}]}'});
  const seen = ["Server-Timing", "X-Request-Id"].map((name) => answer.headers.get(name));
  return [answer.status, (await answer.json()).embeddings?.length, ...seen];
}"""


@pytest.mark.slow
def test_a_page_of_a_named_origin_reads_answers_in_a_browser(settings, serve, tmp_path):
    chromium = installed("chromium", "no page is opened")
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    named, other = (f"http://{host}:{site.server_port}" for host in ("localhost", "127.0.0.1"))
    secret = keys.add(tmp_path / "keys.json", "reader", ["read"])
    try:
        with serve(settings(cors_origins=(named,), keys=tmp_path / "keys.json")) as client, sync_playwright() as start:
            browser = start.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            url = f"{client.base_url}/v1/embed"
            page.goto(f"{named}/missing")
            assert page.evaluate(FETCH, [url, secret])[:2] == [200, 1]
            status, _, timing, request_id = page.evaluate(FETCH, [url, "wrong"])
            assert (status, "total;dur=" in timing, len(request_id)) == (401, True, 16)
            page.goto(f"{other}/missing")
            with pytest.raises(Exception, match="Failed to fetch"):
                page.evaluate(FETCH, [url, secret])
            browser.close()
    finally:
        site.shutdown()
        site.server_close()
