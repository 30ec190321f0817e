"""A local hub of one repository. huggingface_hub is the client, as with the real hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import huggingface_hub
import pytest

from calmclip.export import pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights, hub
from calmclip.export.nets.clip import load
from calmclip.export.recipe import load_recipe
from calmclip.models.errors import ExtraMissing, UnknownCheckpoint
from tests import tiny

REPO, COMMIT = "some-body/Tiny-CLIP_1.0", "0123456789abcdef0123456789abcdef01234567"
OLD = COMMIT[::-1]  # the revision v1


class Hub(BaseHTTPRequestHandler):
    folder: Path
    before: Path  # its content at v1
    broken: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        commit = OLD if {OLD, "v1"} & set(path.split("/")) else COMMIT
        folder = self.before if commit == OLD else self.folder
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        tree = [
            {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()
        ]
        info = {"id": REPO, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        names = ("v1", OLD) if commit == OLD else ("main", COMMIT)
        answers: dict[str, object] = {f"/api/models/{REPO}/revision/{name}": info for name in names}
        answers |= {f"/api/models/{REPO}/tree/{commit}": tree}
        if self.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path in answers:
            self.answer(200, json.dumps(answers[path]).encode(), {"Content-Type": "application/json"})
        elif self.broken:
            self.answer(400, b"", {})
        elif (name := unquote(path.removeprefix(f"/{REPO}/resolve/{commit}/"))) in files:
            self.fetched.append(name)
            self.answer(
                200, files[name], {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": commit}
            )
        else:
            code = "RevisionNotFound" if f"/{REPO}/" in path else "RepoNotFound"
            self.answer(404, b"", {"X-Error-Code": code})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository: a checkpoint, and files that must not be fetched."""
    folder = tiny.hf_clip(tmp_path_factory.mktemp("hub") / "repo")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("merges.txt", "spiece.model", "notes[1].txt"):
        (folder / name).write_text("texts")
    for name in ("modeling.py", "pytorch_model.bin", "weights.pt", "training.pkl", "onnx/model.json", "picture.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never to be fetched")
    return folder


@pytest.fixture
def endpoint(folder: Path, tmp_path: Path) -> Iterator[str]:
    Hub.folder, Hub.fetched, Hub.gated, Hub.broken = folder, [], False, False
    Hub.before = shutil.copytree(folder, tmp_path / "before")
    (Hub.before / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_repository_becomes_a_directory_of_tensors_and_texts(endpoint: str, folder: Path, tmp_path: Path):
    path = hub.locate(f"hf:{REPO}", cache=tmp_path, endpoint=endpoint)
    expected = {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".md", ".txt", ".model")}
    assert {p.name for p in path.iterdir()} == expected
    assert set(Hub.fetched) == expected
    assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_manifest_names_the_commit(endpoint: str, tmp_path: Path):
    for revision, commit, license in (
        ("", COMMIT, "mit"),
        (f"@{COMMIT}", COMMIT, "mit"),
        ("@v1", OLD, "apache-2.0"),
        (f"@{OLD}", OLD, "apache-2.0"),
    ):
        path = hub.locate(f"hf:{REPO}{revision}", cache=tmp_path / "cache", endpoint=endpoint)
        assert hub.name(path) == f"{REPO}@{commit}"
        source = load(str(path)).source
        assert (source.model, source.license) == (f"{REPO}@{commit}", license)


@pytest.mark.parametrize("edit", ["over", "mix"])
def test_weights_for_an_edit_may_be_on_the_hub(
    edit: str, endpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "locate", partial(hub.locate, cache=tmp_path / "cache", endpoint=endpoint))
    params = {"checkpoint": f"hf:{REPO}@v1"} | ({"alpha": 0.5} if edit == "mix" else {})
    adapters = [Adapt(name=edit, params=params)]
    net = pipeline.load("clip", str(folder), Weights(), adapters)
    assert f"of {REPO}@{OLD}" in net.source.notes
    assert f"{edit}/model.safetensors" in net.source.weights
    public = load_recipe(str(folder), "clip", net, adapters=adapters).public()
    assert public["adapters"][0]["params"]["checkpoint"] == f"{REPO}@{OLD}"


def test_a_fetched_copy_is_read_without_the_hub(endpoint: str, tmp_path: Path):
    path = hub.locate(f"hf:{REPO}", cache=tmp_path, endpoint=endpoint)
    nowhere = "http://127.0.0.1:9"
    assert hub.locate(f"hf:{REPO}", cache=tmp_path, endpoint=nowhere) == path
    with pytest.raises(UnknownCheckpoint, match=f"hf:{REPO}@v9: the hub cannot be reached and no copy is here"):
        hub.locate(f"hf:{REPO}@v9", cache=tmp_path, endpoint=nowhere)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("hf:some-body", "is no name on the hub; expected hf:owner/name"),
        ("hf:../../etc", "is no name on the hub"),
        ("hf:../etc", "is no name on the hub"),
        ("hf:a/b@c@d", "is no name on the hub"),
        ("hf:a/b@../../c", "is no name on the hub"),
        ("hf:some-body/else", "is not on the hub, or is private"),
        (f"hf:{REPO}@v9", "has no revision 'v9'"),
    ],
)
def test_a_missing_repository_or_revision_is_named(checkpoint: str, message: str, endpoint: str, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=message) as raised:
        hub.locate(checkpoint, cache=tmp_path, endpoint=endpoint)
    assert "\n" not in str(raised.value)


def test_a_gated_repository_is_an_error_that_says_what_to_do(endpoint: str, tmp_path: Path):
    Hub.gated = True
    with pytest.raises(UnknownCheckpoint, match=f"hf:{REPO} is gated: accept its terms"):
        hub.locate(f"hf:{REPO}", cache=tmp_path, endpoint=endpoint)


def test_a_repository_of_pickles_alone_is_refused_before_any_file_is_fetched(endpoint: str, tmp_path: Path):
    Hub.folder = tmp_path / "pickles"
    Hub.folder.mkdir()
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (Hub.folder / "config.json").write_text("{}")
    with pytest.raises(UnknownCheckpoint, match=r"holds no safetensors, only pytorch_model\.bin"):
        hub.locate(f"hf:{REPO}", cache=tmp_path / "cache", endpoint=endpoint)
    assert Hub.fetched == []


def test_the_index_selects_the_shards_and_no_other_weights(endpoint: str, tmp_path: Path):
    Hub.folder = tmp_path / "shards"
    Hub.folder.mkdir()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*shards, "model.fp16.safetensors"):
        (Hub.folder / name).write_bytes(b"x")
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": "evil.bin"}}
    (Hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (Hub.folder / "evil.bin").write_bytes(b"x")
    path = hub.locate(f"hf:{REPO}", cache=tmp_path / "cache", endpoint=endpoint)
    assert {p.name for p in path.iterdir()} == {*shards, "model.safetensors.index.json"}


def test_shards_are_those_of_the_revision(endpoint: str, tmp_path: Path):
    Hub.before, Hub.folder = (tmp_path / name for name in ("old", "new"))
    for folder in (Hub.before, Hub.folder):
        folder.mkdir()
        (folder / "one.safetensors").write_text(folder.name)
        index = {"weight_map": {"a": "one.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = hub.locate(f"hf:{REPO}@v1", cache=tmp_path / "cache", endpoint=endpoint)
    assert path.name == OLD
    assert (path / "one.safetensors").read_text() == "old"


def test_a_failed_download_is_an_error_of_one_line(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Hub.broken = True
    with pytest.raises(UnknownCheckpoint, match=f"hf:{REPO} could not be fetched: "):
        hub.locate(f"hf:{REPO}", cache=tmp_path / "cache", endpoint=endpoint)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left\n  on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UnknownCheckpoint, match=r"could not be fetched: no space left on device$"):
        hub.locate(f"hf:{REPO}", cache=tmp_path / "cache", endpoint=endpoint)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ExtraMissing, match=r"'huggingface_hub', which is not installed; in .*: pip install -e '\.\[nets\]'"
    ):
        hub.locate(f"hf:{REPO}")


def test_a_path_is_not_looked_up_on_the_hub(tmp_path: Path):
    for path in (tmp_path, tmp_path / "hf:owner" / "name"):
        assert hub.locate(str(path)) == path
    assert hub.name(tmp_path / "vit@2") == hub.short(tmp_path / "vit@2") == "vit@2"


def test_the_name_comes_from_the_snapshots_of_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("snapshots", "blobs"):
        (tmp_path / "models--a--b" / place / COMMIT).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models--a--b" / "snapshots" / COMMIT)
    assert hub.name(Path()) == f"a/b@{COMMIT}"
    assert hub.short(Path()) == "b"
    assert hub.name(tmp_path / "models--a--b" / "blobs" / COMMIT) == COMMIT


def test_the_command_line_takes_a_repository(endpoint: str, tmp_path: Path):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "calmclip.models.cli", "recipe", f"hf:{REPO}@v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["name"] == "tiny-clip_1.0"
