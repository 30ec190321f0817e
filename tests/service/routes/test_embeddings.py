"""OpenAI's request and answer, field by field, over the colours of tests/service/conftest.py.

The shapes are those of https://platform.openai.com/docs/api-reference/embeddings.
"""

import base64
import struct

import pytest

MODEL = "colours-int8"


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def ask(client, **body):
    return client.post("/v1/embeddings", json={"model": MODEL, **body})


@pytest.mark.parametrize("dimensions", [{}, {"dimensions": 3}])
def test_one_text(client, dimensions):
    assert ask(client, input="red", **dimensions).json() == {
        "object": "list",
        "model": MODEL,
        "data": [{"object": "embedding", "index": 0, "embedding": [1, 0, 0]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }


def test_texts_and_pictures_keep_their_order_and_only_texts_have_tokens(client, picture):
    inputs = ["a green thing", uri(picture("blue")), "red", uri(picture("green", kind="JPEG"), "JPEG")]
    answer = ask(client, input=inputs, user="somebody").json()
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    numbers = [round(x, 2) for row in answer["data"] for x in row["embedding"]]
    assert numbers == pytest.approx([0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0], abs=0.02)  # JPEG's greens are nearly green
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_base64_is_little_endian_float32(client):
    (row,) = ask(client, input=["yellow"], encoding_format="base64").json()["data"]
    assert struct.unpack("<3f", base64.b64decode(row["embedding"])) == pytest.approx((0.5**0.5, 0.5**0.5, 0))


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"input": [1, 2, 3]}, 400, "token ids belong to another model's vocabulary"),
        ({"input": [[1, 2], [3]]}, 400, "token ids belong to another model's vocabulary"),
        ({"input": 7}, 400, "expected a text or a list of texts"),
        ({"input": []}, 400, "at least 1 item"),
        ({"input": ""}, 400, "text 0 is empty"),
        ({"input": ["red", "red " * 13]}, 400, "has 13 tokens"),
        ({"input": ["red"] * 257}, 400, "257 inputs were given; at most 256"),
        ({"input": "red", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "red", "dimensions": 2}, 400, "have 3 and cannot be shortened"),
        ({"input": "red", "more": 1}, 400, "more"),
        ({"input": ["red", "data:image/png,abc"]}, 400, "input 1 is not a data URI of a picture"),
        ({"input": "data:image/png;base64,?"}, 400, "input 0 is not a data URI of a picture"),
        ({"input": ["red", "data:image/png;base64,AAAA"]}, 400, "input 1: "),
        ({"model": "gpt", "input": "red"}, 404, "no bundle named 'gpt'"),
    ],
)
def test_an_invalid_request_is_a_problem(client, body, status, says):
    answer = ask(client, **body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert says in answer.json()["detail"]


def test_a_missing_model_is_refused(client):
    answer = client.post("/v1/embeddings", json={"input": "red"})
    assert (answer.status_code, answer.json()["errors"][0]["where"]) == (400, "model")


def test_a_data_uri_that_is_not_of_a_picture_is_a_text(client):
    assert ask(client, input="data:text/plain,red").json()["data"][0]["embedding"] == [1, 0, 0]
