"""GET /v1/collections/{name}/originals/{id}: what was sent comes back, in the content type of its bytes."""

import io

import pytest
from PIL import Image

from calmclip.service.client import Client
from tests.asking import b64

URL = "/v1/collections/photos/originals"


def test_originals_come_back_as_they_were_sent(client, picture):
    jpeg, png = picture("blue", kind="JPEG"), picture("red")
    assert client.put("/v1/collections/photos", json={"keep_originals": True}).status_code == 201
    several = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(several, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    items = [
        {"id": "phone", "image": b64(several.getvalue())},
        {"id": "a/b c?.png", "image": b64(png)},
        {"id": "sea", "image": b64(jpeg)},
        {"id": "words", "text": "a red <script>"},
    ]
    assert client.post("/v1/collections/photos/items", json={"items": items}).status_code == 200
    for path, kind, content in [
        ("a/b%20c%3F.png", "image/png", png),
        ("a%2Fb%20c%3F.png", "image/png", png),
        ("sea", "image/jpeg", jpeg),
        ("phone", "image/jpeg", several.getvalue()),
        ("words", "text/plain; charset=utf-8", b"a red <script>"),
    ]:
        answer = client.get(f"{URL}/{path}")
        assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, kind, content)
        # a page that was uploaded as a text runs nothing, and no cache shows a replaced item
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "private, no-cache"
    with Client(str(client.base_url)) as typed:
        assert typed.original("photos", "a/b c?.png") == png
        assert typed.original("photos", "words") == b"a red <script>"
    changed = {"items": [{"id": "sea", "image": b64(png)}]}
    client.post("/v1/collections/photos/items", json=changed)
    assert client.get(f"{URL}/sea").content == png


@pytest.mark.parametrize(
    ("url", "slug", "says"),
    [
        (f"{URL}/none", "item-not-found", "no item 'none'"),
        ("/v1/collections/bare/originals/sea", "item-not-found", "keep_originals"),
        ("/v1/collections/none/originals/sea", "collection-not-found", "'none'"),
        (f"{URL}/sea?size=3", "invalid-request", "size"),
    ],
)
def test_an_original_that_is_not_there(client, picture, url, slug, says):
    client.put("/v1/collections/photos", json={"keep_originals": True})
    client.put("/v1/collections/bare", json={})
    client.post("/v1/collections/bare/items", json={"items": [{"id": "sea", "image": b64(picture("red"))}]})
    problem = client.get(url).json()
    assert problem["type"].endswith(slug)
    assert says in problem["detail"] + str(problem.get("errors"))
