"""OpenAI's own library, synchronous and asynchronous, against a live service: each method that docs/clients.md claims.

The oracle is the library: what it parses, which exception it raises, and what it repeats.
"""

import asyncio
import base64
from datetime import UTC, datetime

import httpx
import numpy as np
import openai
import pytest

from calmclip.models.errors import Overloaded
from calmclip.service import keys
from calmclip.service.admission import Admission

MODEL = "colours-int8"
CREATED = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())  # of the bundle of conftest.py


def library(client: httpx.Client, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key="any", **options)


@pytest.fixture(scope="module")
def sdk(client):
    with library(client, max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 3}])
def test_texts_and_pictures_become_vectors(sdk, picture, how):
    """Without `encoding_format` the library asks for base64, and decodes it."""
    uri = f"data:image/png;base64,{base64.b64encode(picture('blue')).decode()}"
    answer = sdk.embeddings.create(model=MODEL, input=["red", uri], user="somebody", **how)
    assert (answer.object, answer.model, [row.index for row in answer.data]) == ("list", MODEL, [0, 1])
    rows = [row.embedding for row in answer.data]
    if how.get("encoding_format") == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert np.array(rows) == pytest.approx(np.array([[1, 0, 0], [0, 0, 1]]), abs=1e-6)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (1, 1)


def test_a_text_alone_and_fields_of_ours(sdk):
    answer = sdk.embeddings.create(model=MODEL, input="red " * 20, extra_body={"truncate": "end"})
    assert answer.data[0].embedding == [1, 0, 0]
    raw = sdk.embeddings.with_raw_response.create(model=MODEL, input="red", extra_headers={"x-request-id": "mine"})
    assert (raw.headers["x-request-id"], raw.parse().data[0].embedding) == ("mine", [1, 0, 0])


def test_the_asynchronous_library(client):
    async def ask():
        url = f"{str(client.base_url).rstrip('/')}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as sdk:
            first, second = await asyncio.gather(
                sdk.embeddings.create(model=MODEL, input="red"), sdk.embeddings.create(model=MODEL, input=["green"])
            )
            with pytest.raises(openai.NotFoundError):
                await sdk.models.retrieve("gpt")
            names = [model.id async for model in sdk.models.list()]
            return first.data[0].embedding, second.data[0].embedding, names, (await sdk.models.retrieve(MODEL)).id

    assert asyncio.run(ask()) == ([1, 0, 0], [0, 1, 0], [MODEL], MODEL)


def test_models(sdk, client):
    page = sdk.models.list()
    assert page.object == "list"
    (model,) = page
    assert (model.id, model.object, model.created, model.owned_by) == (MODEL, "model", CREATED, "calmclip")
    assert sdk.models.retrieve(MODEL).created == CREATED
    body = client.get("/v1/models").json()
    assert [each["name"] for each in body["models"]] == [MODEL]  # ours, beside it
    assert client.get(f"/v1/models/{MODEL}").json()["manifest"]["name"] == MODEL


@pytest.mark.parametrize(
    ("ask", "error", "code", "param"),
    [
        ({"input": [1, 2, 3]}, openai.BadRequestError, "invalid_request", "input"),
        ({"input": [[1, 2], [3]]}, openai.BadRequestError, "invalid_request", "input"),
        ({"input": "red " * 20}, openai.BadRequestError, "context_length_exceeded", "input"),
        ({"input": ""}, openai.BadRequestError, "invalid_request", None),
        ({"input": "red", "dimensions": 2}, openai.BadRequestError, "invalid_request", None),
        ({"input": "red", "extra_body": {"more": 1}}, openai.BadRequestError, "invalid_request", "more"),
        ({"input": "data:image/png;base64,AAAA"}, openai.BadRequestError, "unsupported_image", "input"),
        ({"input": "red", "model": "gpt"}, openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_a_wrong_request_raises_the_librarys_exception(sdk, ask, error, code, param):
    with pytest.raises(error) as raised:
        sdk.embeddings.create(**{"model": MODEL, **ask})
    got = raised.value
    assert (got.type, got.code, got.param) == ("invalid_request_error", code, param)
    document = got.response.json()  # our problem is whole beside it
    assert got.body["message"] == document["detail"]
    assert (document["status"], got.request_id) == (got.status_code, document["request_id"])
    assert document["type"].startswith("/problems/")


def test_a_task_that_is_not_served_is_not_repeated(settings, serve, bundle_maker, tmp_path, monkeypatch):
    """The library repeats a 409, which is what other routes answer."""
    path = bundle_maker(tmp_path / "bundles").directory / "bundle.json"
    path.write_text(path.read_text().replace('"embed"', '"raw"'))
    asked = []
    with serve(settings(bundles_dir=tmp_path / "bundles")) as client, library(client, max_retries=2) as sdk:
        monkeypatch.setattr(Admission, "admit", lambda *a, admit=Admission.admit: (asked.append(1), admit(*a))[1])
        with pytest.raises(openai.BadRequestError) as raised:
            sdk.embeddings.create(model=MODEL, input="red")
    assert (raised.value.code, len(asked)) == ("task_not_served", 1)


def test_keys(settings, serve, tmp_path):
    secret = keys.add(tmp_path / "keys", "reader", ["read"])
    scraper = keys.add(tmp_path / "keys", "scraper", ["metrics"])
    with serve(settings(keys=tmp_path / "keys"), ready=False) as client:

        def ask(key):
            url = f"{str(client.base_url).rstrip('/')}/v1"
            with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as sdk:
                return [model.id for model in sdk.models.list()]

        while not client.get("/readyz").json()["ready"]:
            pass
        assert ask(secret) == [MODEL]
        with pytest.raises(openai.AuthenticationError) as raised:
            ask("wrong")
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            ask(scraper)


@pytest.mark.parametrize("seconds", [0.25, 7.0])
def test_an_overloaded_service_is_asked_again_after_its_own_time(client, monkeypatch, seconds):
    """Two refusals, then an answer; the library waits as long as `Retry-After` says, which is in whole seconds."""
    refusals, slept = iter([True, True, False]), []

    def admit(self, *args, allow=Admission.admit):
        if next(refusals):
            raise Overloaded("busy", retry_after=seconds, reason="requests")
        return allow(self, *args)

    monkeypatch.setattr(Admission, "admit", admit)
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    with library(client) as sdk:
        assert sdk.embeddings.create(model=MODEL, input="red").data[0].embedding == [1, 0, 0]
    assert slept == [float(-(-seconds // 1))] * 2


def test_an_overload_that_lasts_and_a_fault_are_errors_of_the_server(client, monkeypatch):
    def refuse(self, *_):
        raise Overloaded("busy", retry_after=1.0, reason="requests")

    monkeypatch.setattr(Admission, "admit", refuse)
    with library(client, max_retries=0) as sdk, pytest.raises(openai.InternalServerError) as raised:
        sdk.embeddings.create(model=MODEL, input="red")
    assert (raised.value.status_code, raised.value.type, raised.value.code) == (503, "server_error", "overloaded")
    monkeypatch.setattr(Admission, "admit", lambda *_: 1 / 0)
    with library(client, max_retries=0) as sdk, pytest.raises(openai.InternalServerError) as raised:
        sdk.embeddings.create(model=MODEL, input="red")
    assert (raised.value.status_code, raised.value.code) == (500, "internal")


def test_other_routes_have_no_error_of_openai(client):
    answer = client.post("/v1/embed", json={"inputs": []})
    assert (answer.status_code, "error" in answer.json()) == (422, False)
