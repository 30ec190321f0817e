"""A fault of a sealed directory is refused by name, and opening a bundle runs no code from it."""

import io
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calmclip import open_bundle
from calmclip.models.bundle import store
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import DefaultClassifier
from calmclip.models.bundle.store import read, seal, stage
from calmclip.models.errors import BundleInvalid, BundleNotFound, BundleTooNew


def edit(sealed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change only the manifest, as an attacker would."""
    path = sealed / "bundle.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def changed_byte(sealed: Path) -> str:
    content = bytearray((sealed / "image.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (sealed / "image.onnx").write_bytes(content)
    return r"image\.onnx has sha256 .*; bundle\.json lists .*\. Export it again"


def truncated(sealed: Path) -> str:
    os.truncate(sealed / "text.onnx", 10)
    return r"text\.onnx has 10 bytes; bundle\.json lists \d+"


def longer(sealed: Path) -> str:
    with (sealed / "text.onnx").open("ab") as file:
        file.write(b"\0")
    return r"text\.onnx has \d+ bytes; bundle\.json lists"


def missing(sealed: Path) -> str:
    (sealed / "tokenizer.json").unlink()
    return r"tokenizer\.json is listed in bundle\.json but does not exist"


def stray(sealed: Path) -> str:
    (sealed / "extra.bin").write_bytes(b"")
    return r"extra\.bin is not listed"


def hidden_stray(sealed: Path) -> str:
    (sealed / "deep").mkdir()
    (sealed / "deep" / ".extra").write_bytes(b"")
    return r"deep/\.extra is not listed"


def link_to_a_file(sealed: Path) -> str:
    os.replace(sealed / "image.onnx", sealed.parent / "image.onnx")
    (sealed / "image.onnx").symlink_to(sealed.parent / "image.onnx")
    return r"image\.onnx is a link or leads out of the bundle"


def link_to_a_file_inside(sealed: Path) -> str:
    (sealed / "twin.onnx").symlink_to("image.onnx")
    return r"twin\.onnx is not listed"


def dangling_link(sealed: Path) -> str:
    (sealed / "nowhere").symlink_to("absent")
    return "nowhere is not listed"


def link_to_a_folder(sealed: Path) -> str:
    outside = sealed.parent / ".outside"
    outside.mkdir()
    os.replace(sealed / "image.onnx", outside / "image.onnx")
    (sealed / "assets").symlink_to(outside)

    def rename(data: dict[str, Any]) -> None:
        data["files"]["assets/image.onnx"] = data["files"].pop("image.onnx")
        data["graphs"]["image"]["file"] = "assets/image.onnx"

    edit(sealed, rename)
    return r"assets/image\.onnx is a link or leads out of the bundle"


def stray_link_to_a_folder(sealed: Path) -> str:
    (sealed / "etc").symlink_to("/etc")
    return "etc is not listed"


def link_to_itself(sealed: Path) -> str:
    (sealed / "image.onnx").unlink()
    (sealed / "image.onnx").symlink_to("image.onnx")
    return r"image\.onnx"


def linked_manifest(sealed: Path) -> str:
    os.replace(sealed / "bundle.json", sealed.parent / "bundle.json")
    (sealed / "bundle.json").symlink_to(sealed.parent / "bundle.json")
    return r"bundle\.json is a link"


def folder_for_a_file(sealed: Path) -> str:
    (sealed / "image.onnx").unlink()
    (sealed / "image.onnx").mkdir()
    return r"image\.onnx is listed in bundle\.json but does not exist"


def pipe_for_a_file(sealed: Path) -> str:
    (sealed / "image.onnx").unlink()
    os.mkfifo(sealed / "image.onnx")
    return r"image\.onnx is listed in bundle\.json but does not exist"


def stray_socket(sealed: Path) -> str:
    here = os.getcwd()
    os.chdir(sealed)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind("s")
    finally:
        os.chdir(here)
    return "s is not listed"


def path_out_of_the_folder(sealed: Path) -> str:
    (sealed.parent / "secret").write_bytes(b"secret")
    edit(sealed, lambda data: data["files"].update({"../secret": {"sha256": "0" * 64, "bytes": 6}}))
    return r"files\.\.\./secret.*not a path inside the bundle"


def empty_manifest(sealed: Path) -> str:
    (sealed / "bundle.json").write_bytes(b"")
    return r"bundle\.json is not JSON"


ATTACKS = [
    changed_byte,
    truncated,
    longer,
    missing,
    stray,
    hidden_stray,
    link_to_a_file,
    link_to_a_file_inside,
    dangling_link,
    link_to_a_folder,
    stray_link_to_a_folder,
    link_to_itself,
    linked_manifest,
    folder_for_a_file,
    pipe_for_a_file,
    stray_socket,
    path_out_of_the_folder,
    empty_manifest,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_file_is_named(sealed: Path, attack: Callable[[Path], str]):
    says = attack(sealed)
    with pytest.raises(BundleInvalid, match=says):
        read(sealed)


EMPTY = {"sha256": "0" * 64, "bytes": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["graphs"]["text"].update(run="rm -rf /"), r"graphs\.text\.run: unknown key"),
        (lambda data: data.pop("files"), "lists no files, so it is not sealed"),
        (lambda data: data.update(tasks=["detect"]), r"bundle\.json: manifest: task 'detect' needs a graph 'detect'"),
        (lambda data: data["files"].update({f"f{i}": EMPTY for i in range(1000)}), "lists 1003 files; at most 1000"),
        (lambda data: data["source"].update(notes="x" * (1 << 20)), r"has \d+ bytes; a manifest has at most 1048576"),
        (
            lambda data: data["files"]["image.onnx"].update(bytes=10**300),
            r"image\.onnx\.bytes|image\.onnx has \d+ bytes",
        ),
    ],
)
def test_a_wrong_manifest_is_named(sealed: Path, change: Callable[[dict[str, Any]], object], says: str):
    edit(sealed, change)
    with pytest.raises(BundleInvalid, match=says):
        read(sealed)


def test_very_deep_folders_are_refused(sealed: Path):
    folder = str(sealed)
    for _ in range(1500):
        folder += "/d"
        os.mkdir(folder)
    (Path(folder) / "stray").touch()
    try:
        with pytest.raises(BundleInvalid, match=r"too deep to walk|stray is not listed"):
            read(sealed)
    finally:  # by hand, because pytest removes folders recursively
        os.unlink(folder + "/stray")
        while folder != str(sealed):
            os.rmdir(folder)
            folder = folder.removesuffix("/d")


def test_without_verify_only_contents_go_unread(sealed: Path):
    changed_byte(sealed)
    assert read(sealed, verify=False).manifest.name == "colours"
    stray(sealed)
    with pytest.raises(BundleInvalid, match="not listed"):
        read(sealed, verify=False)


def test_a_newer_format_asks_for_a_newer_program(sealed: Path):
    edit(sealed, lambda data: data.update(format=7, anything="new"))
    with pytest.raises(BundleTooNew, match="has format 7"):
        read(sealed)


def test_a_directory_without_a_manifest_is_not_a_bundle(tmp_path: Path):
    (tmp_path / "bundle.json").mkdir()
    for directory in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
        with pytest.raises((BundleNotFound, BundleInvalid), match=r"bundle\.json|cannot be read"):
            read(directory)


def test_a_file_without_read_permission_is_named(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "_sha256", denied)  # root may read every file, and tests may run as root
    with pytest.raises(BundleInvalid, match=r"image\.onnx cannot be read: Permission denied"):
        read(sealed)


class Payload:
    """Unpickling this sets ``ran``."""

    ran = False

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        return (_run, ())


def _run() -> None:
    Payload.ran = True


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, keys=np.zeros(3))
    return file.getvalue()


HUGE = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
HUGE += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"


@pytest.fixture
def with_file(sealed: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """The bundle, sealed again with other files and a changed manifest."""

    def build(files: dict[str, bytes], **changes: Any) -> Bundle:
        with stage(tmp_path / "more", "colours") as staged:
            for path in sealed.iterdir():
                (staged / path.name).write_bytes(path.read_bytes())
            for name, content in files.items():
                (staged / name).write_bytes(content)
            return Bundle(seal(staged, read(sealed).manifest.model_copy(update=changes)))

    return build


@pytest.mark.parametrize(
    "content",
    [
        npy(np.array([Payload()], object)),
        pickle.dumps(Payload()),
        npy(np.zeros(100))[:200],
        npz(),
        HUGE,
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00",
        b"no array at all",
    ],
)
def test_an_asset_is_a_plain_array_and_runs_nothing(sealed: Path, with_file: Callable[..., Bundle], content: bytes):
    bundle = with_file({"keys.npy": content}, classifier=head(sealed, assets={"keys": "keys.npy"}))
    with pytest.raises(BundleInvalid, match=r"keys\.npy is not a plain \.npy array"):
        bundle.classifier  # noqa: B018 - reads the assets
    assert not Payload.ran


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"{" * 100_000, b'{"model": {"type": "Magic"}}'])
def test_an_invalid_tokenizer_is_refused(with_file: Callable[..., Bundle], content: bytes):
    bundle = with_file({"tokenizer.json": content})
    for read_tokenizer in (bundle.warm, bundle.text):
        with pytest.raises(BundleInvalid, match=r"tokenizer\.json is not a tokenizer"):
            read_tokenizer()


@pytest.mark.parametrize("content", [b"", b'["a", 1]', b"[" * 100_000, b'["\xff"]', b'"cat"', b'{"a": ["b", 1]}'])
@pytest.mark.parametrize("kind", ["labels", "descriptions"])
def test_invalid_labels_and_descriptions_are_refused(
    with_file: Callable[..., Bundle], sealed: Path, kind: str, content: bytes
):
    bundle = with_file({f"{kind}.json": content}, classifier=classifier(sealed, **{kind: f"{kind}.json"}))
    with pytest.raises(BundleInvalid, match=rf"{kind}\.json is not"):
        bundle.classifier  # noqa: B018 - reads the file


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"labels": ["a", "b", "a"]}, "the label 'a' is given twice"),
        ({"labels": ["a", " "]}, "label 1 is empty"),
        ({"labels": ["a"], "descriptions": {"b": ["a b"]}}, "descriptions of 'b', which is none of the 1 labels"),
        (
            {"labels": ["a"], "descriptions": {"a": []}},
            r"the descriptions of 'a' are \(\); expected a list of sentences",
        ),
    ],
)
def test_a_classifier_that_contradicts_itself_is_refused(
    with_file: Callable[..., Bundle], sealed: Path, files: dict[str, object], says: str
):
    paths = {kind: f"{kind}.json" for kind in files}
    content = {f"{kind}.json": json.dumps(data).encode() for kind, data in files.items()}
    bundle = with_file(content, classifier=classifier(sealed, **paths))
    with pytest.raises(BundleInvalid, match=f"its classifier: .*{says}"):
        bundle.warm()


def test_a_bundle_of_unknown_tasks_is_too_new_and_known_tasks_are_served(with_file: Callable[..., Bundle]):
    assert with_file({}, name="other", tasks=("embed", "levitate")).tasks == ("embed", "compress", "explain")
    with pytest.raises(BundleTooNew, match=r"serves levitate; this calmclip knows none of these, only anomaly, "):
        with_file({}, tasks=("levitate",))


def test_unknown_plugins_and_params_are_refused(with_file: Callable[..., Bundle], sealed: Path):
    for name, changed, says in (
        ("one", {"params": {"scale": 1.0, "temper": 2}}, "head 'cosine': params .*temper: unknown key"),
        ("two", {"name": "cosinus"}, "there is no heads 'cosinus'"),
    ):
        bundle = with_file({}, name=name, classifier=head(sealed, **changed))
        with pytest.raises(BundleInvalid, match=says):
            bundle.warm()


def classifier(sealed: Path, **changed: object) -> DefaultClassifier:
    default = read(sealed).manifest.classifier
    assert default
    return default.model_copy(update=changed)


def head(sealed: Path, **changed: object) -> DefaultClassifier:
    plugin = classifier(sealed).head
    assert plugin
    return classifier(sealed, head=plugin.model_copy(update=changed))


# --- graphs ---------------------------------------------------------------------------------------------------------


def reopen(bundle: Bundle) -> None:
    open_bundle(bundle.directory).session("image")


@pytest.mark.parametrize("content", [b"", b"not ONNX", b"\x08\x09" * 1000])
def test_a_graph_that_does_not_load_is_refused(with_file: Callable[..., Bundle], content: bytes):
    with pytest.raises(BundleInvalid, match=r"image\.onnx does not load in ONNX Runtime"):
        reopen(with_file({"image.onnx": content}))


def outside_weights(location: str) -> bytes:
    """A graph pixels -> image_embeds whose weights lie in another file."""
    weights = onnx.TensorProto(name="w", data_type=1, dims=[3], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        weights.external_data.add(key=key, value=value)
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        image (float[B, 3, 4, 4] pixels) => (float[B, 3] image_embeds) {
            axes = Constant <value_ints = [2, 3]> ()
            mean = ReduceMean <keepdims = 0> (pixels, axes)
            image_embeds = Add (mean, w)
        }""")
    model.graph.initializer.append(weights)
    return model.SerializeToString()


WEIGHTS = np.array([1, 2, 3], np.float32).tobytes()


def test_graphs_may_read_a_listed_weights_file(with_file: Callable[..., Bundle]):
    bundle = with_file({"image.onnx": outside_weights("weights.bin"), "weights.bin": WEIGHTS})
    answer = open_bundle(bundle.directory).raw("image", {"pixels": np.zeros((1, 3, 4, 4), np.float32)})
    assert answer["image_embeds"].tolist() == [[1, 2, 3]]
    (bundle.directory / "weights.bin").write_bytes(WEIGHTS[::-1])
    with pytest.raises(BundleInvalid, match=r"weights\.bin has sha256"):
        read(bundle.directory)


@pytest.mark.parametrize("how", ["../secret.bin", "absolute", "absent.bin", "sub/../../secret.bin", ""])
def test_a_graph_that_reads_outside_its_folder_is_refused(with_file: Callable[..., Bundle], tmp_path: Path, how: str):
    secret = tmp_path / "more" / "secret.bin"
    secret.parent.mkdir(exist_ok=True)
    secret.write_bytes(WEIGHTS)
    bundle = with_file({"image.onnx": outside_weights(str(secret) if how == "absolute" else how)})
    with pytest.raises(BundleInvalid, match="does not load"):
        reopen(bundle)


def test_a_graph_that_is_not_what_its_manifest_says_is_refused(with_file: Callable[..., Bundle], sealed: Path):
    text = (sealed / "text.onnx").read_bytes()
    with pytest.raises(BundleInvalid, match=r"has the inputs \['ids'\]; the manifest promises \['pixels'\]"):
        reopen(with_file({"image.onnx": text}))
