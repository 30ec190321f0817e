"""The page /docs, made of /openapi.json."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
from playwright.sync_api import Browser, expect

from calmclip.service import keys
from calmclip.service.settings import Settings
from tests.process import installed
from tests.service.browsing import Serve
from tests.service.test_page import opened


def test_the_reference_shows_every_operation_field_and_schema(browser: Browser, client: httpx.Client) -> None:
    specification = client.get("/openapi.json").json()
    schemas = specification["components"]["schemas"]
    listed = {
        operation["operationId"]: f"{verb.upper()} {path}"
        for path, verbs in specification["paths"].items()
        for verb, operation in verbs.items()
    }
    with opened(browser, client) as page:
        page.get_by_role("link", name="API").click()
        articles = page.locator("#reference article")
        expect(articles).to_have_count(len(listed) + len(schemas))
        headings = "all => Object.fromEntries(all.map((a) => [a.id, a.querySelector('h3').textContent]))"
        assert articles.evaluate_all(headings) == listed | {name: name for name in schemas}
        rows = """all => Object.fromEntries(all.map((article) =>
            [article.id, [...article.querySelectorAll('tbody th')].map((head) => head.textContent)]))"""
        shown = page.locator("section[aria-label=schemas] article").evaluate_all(rows)
        for name, schema in schemas.items():
            required = schema.get("required", [])
            fields = [f"{field} *" if field in required else field for field in schema.get("properties", {})]
            assert shown[name] == fields, name
        broken = "all => all.filter((a) => !document.getElementById(a.hash.slice(1))).map((a) => a.hash)"
        assert page.locator("a[href^='#']").evaluate_all(broken) == []
        assert "undefined" not in page.locator("body").inner_text()

        find = page.get_by_label("Find")
        find.fill("SIGMA suppression")
        expect(page.locator("#contents a:visible").first).to_have_text("POST /v1/detect")
        visible = {entry for entry in listed if page.locator(f"[id='{entry}']").is_visible()}
        wanted = {
            entry for entry in listed
            if all(word in page.locator(f"[id='{entry}']").text_content().lower() for word in ("sigma", "suppression"))
        }  # fmt: skip
        assert visible == wanted
        find.fill("no such word")
        expect(page.locator("#count")).to_have_text(f"0 of {len(listed) + len(schemas)}")
        expect(page.locator("#reference h2:visible")).to_have_count(0)
        find.fill("")
        page.get_by_role("link", name="DetectBody").first.click()
        expect(page.locator("#DetectBody")).to_be_in_viewport()
        page.reload()
        expect(page.locator("#DetectBody")).to_be_in_viewport()


def test_the_references_examples_run_and_a_key_is_asked_for(
    browser: Browser, serve: Serve, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """The other examples' bodies are run by the tests of the specification."""
    secret = keys.add(tmp_path / "keys.json", "reader", ["read"])
    with serve(settings(keys=tmp_path / "keys.json")) as client, opened(browser, client) as page:
        page.goto(f"{client.base_url}/docs")
        expect(page.get_by_role("alert")).to_contain_text("a key is needed")
        page.get_by_label("API key").fill(secret)
        page.get_by_label("API key").press("Enter")
        article = page.locator("article").filter(has=page.locator("h3", has_text="POST /v1/classify"))
        expect(article).to_contain_text("Needs a key for read.")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        article.get_by_role("button", name="Copy as curl").click()
        expect(article.locator("output")).to_have_text("Copied.")
        command = page.evaluate("navigator.clipboard.readText()")
        assert secret not in command
        search = page.locator("article").filter(has=page.locator("h3", has_text="POST /v1/collections/{name}/search"))
        expect(search.locator("pre")).to_contain_text("/v1/collections/NAME/search' ")
        installed("curl", "commands of the page")
        environment = {**os.environ, "CALMCLIP_API_KEY": secret}
        run = subprocess.run(["bash", "-c", command], check=True, env=environment, capture_output=True, timeout=30)
        assert [entry["label"] for entry in json.loads(run.stdout)["labels"]] == ["a cat", "a dog"]
