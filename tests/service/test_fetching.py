"""Pictures by URL: the service fetches only pictures of allowed hosts at public addresses.

The network is a resolver with the test's answers and a dialler that connects to a TLS server in this process; both
note their calls.
"""

import asyncio
import http.server
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from calmclip.models.errors import ImageTooLarge
from calmclip.service import fetching
from calmclip.service.errors import NotFetched
from calmclip.service.fetching import MAX_URLS, Fetcher, is_public
from calmclip.service.settings import Limits, Settings

HOST = "images.example.org"
PEM = Path(__file__).parents[1] / "data" / f"{HOST}.pem"
PUBLIC = "93.184.215.14"
LIMITS = Limits(image_bytes=5000, body_bytes=12_000)


class Pages(http.server.BaseHTTPRequestHandler):
    """/picture is a picture; the other paths are faults of a host."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        body, status, headers = self.server.picture, 200, {}
        if self.path == "/moved":
            status, headers = 302, {"Location": f"https://{HOST}/picture"}
        elif self.path == "/moved-inside":
            status, headers = 301, {"Location": "https://169.254.169.254/latest/meta-data/"}
        elif self.path == "/none":
            status = 404
        elif self.path == "/packed":
            headers = {"Content-Encoding": "gzip"}
        elif self.path == "/large":
            body = bytes(5001)
        elif self.path == "/endless":
            body, headers = bytes(100_000), {"Transfer-Encoding": "chunked"}
        elif self.path == "/short":
            headers = {"Content-Length": str(len(body) + 1)}
        elif self.path == "/slow":
            time.sleep(0.6)
        elif self.path == "/liar":
            self.wfile.write(b"SSH-2.0-x\r\n")
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if name != "Content-Length" or "Transfer-Encoding" not in headers:
                self.send_header(name, value)
        self.end_headers()
        if "Transfer-Encoding" in headers:
            for _ in range(1000):
                self.wfile.write(b"64\r\n" + bytes(100) + b"\r\n")
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Network:
    """``addresses``: the answers of the resolver, one list per call; the last list stays."""

    def __init__(self, picture: bytes) -> None:
        self.addresses = [[PUBLIC]]
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, str]] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        self.server.handle_error = lambda *_: None  # a disconnect is expected
        self.server.picture, self.server.seen, self.names = picture, [], []
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(PEM)
        tls.sni_callback = lambda _, name, __: self.names.append(name)
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.trust = ssl.create_default_context(cafile=PEM)

    async def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        return self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]

    async def dial(self, address: str, host: str) -> fetching.Wire:
        self.dialled.append((address, host))
        port = self.server.server_address[1]
        return await asyncio.open_connection("127.0.0.1", port, ssl=self.trust, server_hostname=host)

    def fetch(self, url: str, hosts: tuple[str, ...] = (HOST,)) -> bytes:
        return asyncio.run(Fetcher(hosts, LIMITS, self.resolve, self.dial).fetch(url))


@pytest.fixture
def network(picture) -> Iterator[Network]:
    opened = Network(picture("red"))
    thread = threading.Thread(target=opened.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield opened
    opened.server.shutdown()
    thread.join()
    opened.server.server_close()


def test_a_picture_comes_from_the_checked_address_under_its_name(network, picture):
    network.addresses = [["2606:2800:21f:cb07:6820:80da:af6b:8b2c", PUBLIC]]
    assert network.fetch("https://IMAGES.Example.org/picture?size=small&x=%2e%2E") == picture("red")
    assert network.resolved == [HOST]
    assert network.dialled == [("2606:2800:21f:cb07:6820:80da:af6b:8b2c", HOST)]
    assert network.names == [HOST]
    assert network.server.seen == [("/picture?size=small&x=%2e%2E", HOST)]


# RFC 6890 for IPv4 and IPv6, cloud metadata, and addresses embedded in other addresses
INSIDE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fec0::1",
    "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "", "localhost", "0177.0.0.1",
    "2130706433",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_nothing_is_fetched_from_an_address_that_is_not_public(network, address):
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
        network.addresses = [addresses]
        with pytest.raises(NotFetched, match="not public") as error:
            network.fetch(f"https://{HOST}/picture")
        assert not address or address not in str(error.value)  # the error hides internal addresses
    assert network.dialled == []


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1"])
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_a_name_is_resolved_once_per_request(network):
    """DNS rebinding: the first answer is public, every later answer is not."""
    network.addresses = [[PUBLIC], ["127.0.0.1"]]
    network.fetch(f"https://{HOST}/picture")
    assert network.resolved == [HOST]
    assert network.dialled == [(PUBLIC, HOST)]
    with pytest.raises(NotFetched):
        network.fetch(f"https://{HOST}/picture")
    assert len(network.dialled) == 1


def test_a_name_without_addresses(network):
    network.addresses = [[]]
    with pytest.raises(NotFetched, match="no IP address"):
        network.fetch(f"https://{HOST}/picture")


@pytest.mark.parametrize(
    "url",
    [
        "http://{}/picture", "ftp://{}/picture", "file:///etc/passwd", "gopher://{}/_", "HTTPS://{}/picture",
        "//{}/picture",
        "{}/picture", "", "https://", "https:///picture", "https:/{}/picture", "https:\\\\{}\\picture", "https://{}",
        "https://user@{}/picture", "https://user:word@{}/picture", "https://{}@127.0.0.1/picture", "https://{}:443/picture",
        "https://127.0.0.1#@{}/picture", "https://127.0.0.1\\@{}/picture", "https://{}\\@127.0.0.1/picture",
        "https://{}:8443/picture", "https://{}:@127.0.0.1/picture", "https://{}./picture", "https://.{}/picture",
        "https://{}.evil.example/picture", "https://evil.example/{}/picture", "https://evil-{}/picture",
        "https://evil.example?{}/picture", "https://127.0.0.1/picture", "https://2130706433/picture",
        "https://0x7f000001/picture", "https://0x7f.1/picture", "https://0177.0.0.1/picture", "https://127.1/picture",
        "https://[::1]/picture", "https://[::ffff:127.0.0.1]/picture", "https://localhost/picture",
        "https://images.example.org\u3002/picture", "https://images\u3002example\u3002org/picture",
        "https://\u24d8mages.example.org/picture", "https://images.ex\u0430mple.org/picture", "https://images%2eexample.org/p",
        "https://{}/pic ture", "https://{}/pic\tture", "https://{}/pic\r\nHost: evil.example\r\n\r\n", "https://{}/\x00",
        "https://{}/picture\n", " https://{}/picture", "https://{}/picture#part", "https://{}/p\u00e4", "https://{}\u200b/picture",
        "https://{}/" + "x" * 2001, "data:image/png;base64,AAAA", "https://{}/\\..\\picture",
    ],
)  # fmt: skip
def test_invalid_and_misleading_urls_are_not_resolved(network, url):
    with pytest.raises(NotFetched):
        network.fetch(url.replace("{}", HOST))
    assert network.resolved == network.dialled == network.server.seen == []


@pytest.mark.parametrize(
    ("path", "error", "word"),
    [
        ("moved", NotFetched, "302"), ("moved-inside", NotFetched, "301"), ("none", NotFetched, "404"),
        ("packed", NotFetched, "no content encoding"), ("large", ImageTooLarge, "5000 bytes"),
        ("endless", ImageTooLarge, "5000 bytes"), ("short", NotFetched, "did not give"),
        ("liar", NotFetched, "did not give"),
        ("slow", NotFetched, "0.3 s"),
    ],
)  # fmt: skip
def test_faults_of_a_host(network, monkeypatch, path, error, word):
    if path == "slow":
        monkeypatch.setattr(fetching, "TIMEOUT_S", 0.3)
    with pytest.raises(error, match=word):
        network.fetch(f"https://{HOST}/{path}")
    assert len(network.dialled) == len(network.server.seen) == 1


def test_a_certificate_of_another_name_is_refused(network):
    with pytest.raises(NotFetched, match="did not give"):
        network.fetch("https://other.example.org/picture", hosts=("other.example.org",))
    assert network.server.seen == []


def test_a_connection_goes_to_the_address_and_requires_a_certificate_for_the_name(monkeypatch):
    dialled = []

    async def open_connection(address: str, port: int, **how: object) -> None:
        dialled.append((address, port, how["server_hostname"], how["ssl"]))
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio, "open_connection", open_connection)

    async def resolve(host: str) -> list[str]:
        return [PUBLIC]

    with pytest.raises(NotFetched):
        asyncio.run(Fetcher([HOST], LIMITS, resolve).fetch(f"https://{HOST}/picture"))
    ((address, port, name, tls),) = dialled
    assert (address, port, name) == (PUBLIC, 443, HOST)
    assert tls.check_hostname
    assert tls.verify_mode is ssl.CERT_REQUIRED


def test_over_http(network, settings, serve, picture, monkeypatch):
    monkeypatch.setattr(fetching, "_resolve", network.resolve)
    monkeypatch.setattr(Fetcher, "_dial_tls", lambda self, *where: network.dial(*where))
    shown = {"url": f"https://{HOST}/picture"}
    with serve(settings(url_hosts=HOST, limits={"body_bytes": 12_000})) as client:
        answer = client.post("/v1/classify", json={"image": shown, "labels": ["red", "blue"]})
        assert answer.json()["labels"][0]["label"] == "red"
        embedded = client.post("/v1/embed", json={"inputs": [{"text": "red"}, {"image": shown}]})
        assert len(embedded.json()["embeddings"]) == 2
        detected = client.post("/v1/detect", json={"image": shown, "examples": [{"image": shown}]})
        assert detected.status_code == 200
        client.put("/v1/collections/photos", json={})
        item = {"id": "a", "image": shown, "meta": {"image": {"url": "https://127.0.0.1/"}}}
        assert client.post("/v1/collections/photos/items", json={"items": [item]}).status_code == 200
        query = {"query": {"image": shown}}
        assert [hit["id"] for hit in client.post("/v1/collections/photos/search", json=query).json()["hits"]] == ["a"]
        assert len(network.dialled) == 6
        for url, status, slug in ((f"https://{HOST}/none", 422, "picture-not-fetched"),
                                  ("https://evil.example/x", 422, "picture-not-fetched"),
                                  (f"https://{HOST}/endless", 413, "image-too-large")):  # fmt: skip
            answer = client.post("/v1/classify", json={"image": {"url": url}, "labels": ["red"]})
            assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}")
        many = client.post("/v1/embed", json={"inputs": [{"image": shown}] * (MAX_URLS + 1)})
        assert many.status_code == 422
        assert f"at most {MAX_URLS}" in many.json()["detail"]
        assert len(network.dialled) == 8
        assert "calmclip_pending_bytes 0.0" in client.get("/metrics").text


def test_a_text_of_an_openai_request_that_is_only_a_url_is_that_picture(network, settings, serve, monkeypatch):
    monkeypatch.setattr(fetching, "_resolve", network.resolve)
    monkeypatch.setattr(Fetcher, "_dial_tls", lambda self, *where: network.dial(*where))
    address = f"https://{HOST}/picture"
    with serve(settings(url_hosts=HOST)) as client:

        def ask(text: object):
            return client.post("/v1/embeddings", json={"model": "colours-int8", "input": text})

        for text, tokens in ((address, 0), ([address], 0), (["blue", address], 1)):  # a picture has no tokens
            answer = ask(text).json()
            assert answer["data"][-1]["embedding"] == [1, 0, 0]
            assert answer["usage"]["prompt_tokens"] == tokens
        assert len(network.dialled) == 3
        assert ask(f"a {address}").json()["usage"]["prompt_tokens"] > 1  # a text that contains a URL
        assert ask([f"http://{HOST}/picture"]).json()["usage"]["prompt_tokens"] > 1
        for other in ("https://evil.example/x", "HTTPS://127.0.0.1/"):
            assert ask(["red", other]).json()["type"] == "/problems/picture-not-fetched"
        assert ask([{"url": address}]).status_code == 400
        assert len(network.dialled) == 3
    with serve(settings()) as client:
        assert ask(address).json()["usage"]["prompt_tokens"] > 1
    assert len(network.dialled) == 3


def test_the_bytes_of_all_pictures_have_a_limit(network):
    network.server.picture = bytes(4500)
    body = {"inputs": [{"image": {"url": f"https://{HOST}/picture"}} for _ in range(3)]}
    fetcher = Fetcher([HOST], LIMITS, network.resolve, network.dial)
    with pytest.raises(ImageTooLarge, match="12000"):
        asyncio.run(fetcher.fill(body, lambda size: None))


def test_without_hosts_nothing_is_fetched(network, client, monkeypatch):
    monkeypatch.setattr(fetching, "_resolve", network.resolve)
    answer = client.post("/v1/classify", json={"image": {"url": f"https://{HOST}/picture"}, "labels": ["red"]})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/picture-not-fetched")
    assert "switches it on by CALMCLIP_URL_HOSTS=" in answer.json()["detail"]
    assert network.resolved == []
    text = client.post("/v1/embeddings", json={"model": "colours-int8", "input": f"https://{HOST}/red"})
    assert "picture-not-fetched" not in text.text  # without hosts it is a text like any other


@pytest.mark.parametrize(
    "body",
    [
        {"image": {"url": "u"}},
        {"images": [{"b64": "AAAA"}, {"url": "u"}]},
        {"query": {"image": {"url": "u"}}},
        {"query": [{"text": "red"}, {"image": {"url": "u"}, "weight": -1}]},
        {"inputs": [{"image": {"url": "u"}}], "items": 3},
        {"examples": [None, {"image": {"url": "u"}}], "images": {"url": "u"}},
    ],
)
def test_a_picture_by_url_is_looked_for_where_pictures_stand(body):
    """Without hosts it is refused wherever a schema takes a picture; metadata and other fields are not looked at."""
    fetcher = Fetcher((), LIMITS)
    with pytest.raises(NotFetched, match="fetches no pictures"):
        asyncio.run(fetcher.fill(body, lambda size: None))
    elsewhere = ({"meta": body}, {"labels": [body]}, [body])
    for value in (*elsewhere, {"image": {"url": "u", "b64": ""}}, {"image": {"url": 3}}):
        asyncio.run(fetcher.fill(value, lambda size: None))


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "*.example.org", "https://example.org", "example.org:80", "::1", "0x7f.0x1", "x"]
)
def test_a_host_in_the_settings_must_be_a_name(name):
    with pytest.raises(ValidationError, match="not a host name"):
        Settings(url_hosts=name)
    assert Settings(url_hosts="Images.Example.org, b.example.org").url_hosts == (HOST, "b.example.org")
