"""Damaged, mislabelled and malicious files are refused. The error is one line that names the file and the key."""

import argparse
import errno
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from calmclip.export import checkpoints
from calmclip.export.checkpoints import pickles, torchscript
from calmclip.export.checkpoints.locate import NoWeights, weight_files
from calmclip.export.checkpoints.weights import load_tensors
from calmclip.models.cli import main
from calmclip.models.errors import UnknownCheckpoint
from tests.tiny import changed

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5), "count": torch.tensor(7)}


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)
        self.register_buffer("flags", torch.ones(2, 3, dtype=torch.float16).T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def refused(file: Path, *parts: str) -> None:
    """The error is one line. It does not repeat torch's advice to unpickle the file."""
    with pytest.raises(UnknownCheckpoint) as raised:
        load_tensors(weight_files(file))
    text = str(raised.value)
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 600
    assert not [advice for advice in ("weights_only", "PyTorch 2") if advice in text]
    for part in (*parts, file.name):
        assert part in text


def safetensors(file: Path, header: dict | bytes, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(offsets: tuple[int, int], shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b'{"a": ', b"", None),
        (b"{}", b"", 1 << 60),
        (b"{}", b"", 100),
        ({"a": entry((0, 8)), "b": entry((4, 12))}, bytes(12), None),
        ({"a": entry((0, 8))}, bytes(4), None),
        ({"a": entry((0, 8))}, bytes(16), None),
        ({"a": entry((0, 8), (3,))}, bytes(8), None),
        ({"a": entry((0, 8), (1 << 40, 1 << 40))}, bytes(8), None),
        ({"a": entry((8, 0))}, bytes(8), None),
        ({"a": entry((0, 8), dtype="F33")}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
    ],
    ids=[
        "header-cut", "header-of-an-exabyte", "header-longer-than-the-file", "offsets-overlap", "data-cut",
        "data-left-over", "shape-of-other-size", "shape-that-overflows", "offsets-backwards", "dtype", "no-shape",
    ],
)  # fmt: skip
def test_a_bad_safetensors_file(header, data: bytes, length: int | None, tmp_path: Path):
    refused(safetensors(tmp_path / "model.safetensors", header, data, length))


def zipped(tmp_path: Path) -> Path:
    torch.save(TENSORS, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def legacy(tmp_path: Path) -> Path:
    torch.save(TENSORS, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    return tmp_path / "model.pt"


def scripted(tmp_path: Path) -> Path:
    torch.jit.script(Holder()).save(str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def tensors(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.pt")
    return tmp_path / "model.pt"


FORMATS = pytest.mark.parametrize("write", [zipped, legacy, scripted, tensors])


@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_a_file_cut_short(write: Callable[[Path], Path], share: float, tmp_path: Path):
    file = write(tmp_path)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    refused(file)


@FORMATS
def test_bytes_decide_the_format_not_the_name(write: Callable[[Path], Path], tmp_path: Path):
    file = write(tmp_path)
    for suffix in (".safetensors", ".bin", ".pth", ".ckpt", ".pt"):
        file = file.rename(tmp_path / f"model{suffix}")
        tensors = load_tensors(weight_files(tmp_path))
        if write is scripted:
            assert tensors["flags"].dtype == torch.float16
            assert tensors.keys() == {"inner.weight", "inner.bias", "flags"}
        else:
            assert tensors.keys() == TENSORS.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"\x00" * 64, b"GIF89a", b"{}", b"\x80\x02}q\x00."])
def test_other_files_are_refused(content: bytes, tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(content)
    refused(tmp_path / "model.bin")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_pickle_that_runs_a_command_is_refused_and_not_run(protocol: int, tmp_path: Path):
    sign = tmp_path / "it-ran"
    file = tmp_path / "model.bin"
    file.write_bytes(pickle.dumps({"a": Payload(f"touch {sign}")}, protocol=protocol))
    refused(file, f"{os.system.__module__}.system", "not run")
    assert not sign.exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_payload_beside_tensors_is_refused_and_not_run(new: bool, tmp_path: Path):
    sign, file = tmp_path / "it-ran", tmp_path / "model.pt"
    torch.save(TENSORS | {"x": Payload(f"touch {sign}")}, file, _use_new_zipfile_serialization=new)
    refused(file, "posix.system" if os.name == "posix" else "system", "not run")
    assert not sign.exists()


def test_names_of_a_pickle_are_read_through_its_memo(tmp_path: Path):
    """The second payload refers to the memo."""
    file = tmp_path / "model.bin"
    file.write_bytes(pickle.dumps([argparse.Namespace(a=1), Payload("true"), Payload("false")], protocol=4))
    assert pickles.foreign_name(file) == f"{os.system.__module__}.system"


def test_training_flags_beside_tensors_are_ignored(tmp_path: Path):
    torch.save({"state_dict": TENSORS, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path / "m.pt")
    assert load_tensors([tmp_path / "m.pt"]).keys() == TENSORS.keys()


def rewritten(file: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other bytes in its parts. None removes a part."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts.items():
            if (new := change(name, data)) is not None:
                archive.writestr(name, new)
    return file


def test_a_torchscript_archive_with_a_foreign_name_runs_nothing(tmp_path: Path):
    sign = tmp_path / "it-ran"
    payload = pickle.dumps({"a": Payload(f"touch {sign}")}, protocol=2)
    file = rewritten(scripted(tmp_path), lambda n, d: payload if n.endswith("/data.pkl") else d)
    refused(file, f"{os.system.__module__}.system", "not run")
    assert not sign.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d: None if n.endswith("data/0") else d, "data/0"),
        (lambda n, d: d[:4] if "/data/" in n else d, "data/"),
        (lambda n, d: None if n.endswith("data.pkl") else d, "data.pkl"),
        (lambda n, d: b"\x80\x02}" if n.endswith("data.pkl") else d, "model.pt"),
        (lambda n, d: d.replace(b"FloatStorage", b"QInt8Storage"), "QInt8Storage"),
    ],
    ids=["no-numbers", "numbers-cut", "no-tree", "tree-that-is-no-pickle", "numbers-of-an-unknown-kind"],
)
def test_a_torchscript_archive_with_a_bad_part_names_it(change, message: str, tmp_path: Path):
    refused(rewritten(scripted(tmp_path), change), message)


@pytest.mark.parametrize("write", [zipped, scripted])
def test_a_compressed_archive_is_not_unpacked(write: Callable[[Path], Path], tmp_path: Path):
    refused(rewritten(write(tmp_path), lambda n, d: d, zipfile.ZIP_DEFLATED), "compressed")


def test_an_archive_without_a_pickle(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # a stride of 0 turns four bytes into a tebibyte
        ({"a": torch.ones(1).expand(1 << 19, 1 << 19), "b": torch.ones(3)}, "a has the shape|than the file holds"),
        *(({name: torch.ones(2)}, "name") for name in ("a\nb", "a\x1b[31m", "a" * 300, "a\u202eb")),  # not printable
        ({"odd": torch.eye(3).to_sparse(), "b": torch.ones(2)}, "odd"),
        ({"odd": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "b": torch.ones(2)}, "odd"),
        *((value, "") for value in ([1, 2], 7, {}, {"epoch": 3, "lr\n": 0.1}, torch.ones(2))),
    ],
)
def test_values_other_than_plain_tensors_are_named(value: object, message: str, tmp_path: Path):
    torch.save(value, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", *message.split("|"))


def test_a_mapping_that_contains_itself_is_refused(tmp_path: Path):
    state: dict = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "model.pt")
    refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "part-1.safetensors"}}, "part-1.safetensors"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "../outside.safetensors"),
        ({"weight_map": {"a": "/etc/hostname"}}, "/etc/hostname"),
        ({"weight_map": {"a": ".."}}, ".."),
        ({"weight_map": {"a": 3}}, "3"),
        ({"weight_map": {"a": [1]}}, "index"),
        ({"weight_map": {}}, "no shard"),
        ({"weight_map": []}, "index"),
        ({}, "weight_map"),
        ([], "index"),
    ],
)
def test_shards_that_are_missing_or_outside_are_refused(index: object, message: str, tmp_path: Path):
    save_file(TENSORS, tmp_path / "outside.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnknownCheckpoint, match="index") as raised:
        checkpoints.read(directory)
    assert message in str(raised.value)


def test_shards_are_joined_and_none_may_repeat_a_tensor(tmp_path: Path):
    names = ["one.safetensors", "two.safetensors"]
    save_file({"a": torch.ones(1)}, tmp_path / names[0])
    save_file({"b": torch.zeros(1)}, tmp_path / names[1])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names))}))  # noqa: B905
    assert load_tensors(weight_files(tmp_path)).keys() == {"a", "b"}
    save_file({"a": torch.zeros(1)}, tmp_path / names[1])
    with pytest.raises(UnknownCheckpoint, match=r"two\.safetensors holds a, "):
        load_tensors(weight_files(tmp_path))


def test_links_are_followed_and_broken_links_are_missing_files(tmp_path: Path):
    """The cache of a model hub consists of links."""
    save_file(TENSORS, tmp_path / "blob")
    directory = tmp_path / "snapshot"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(tmp_path / "blob")
    assert load_tensors(weight_files(directory)).keys() == TENSORS.keys()
    (tmp_path / "blob").unlink()
    with pytest.raises(NoWeights, match="snapshot"):
        weight_files(directory)
    (directory / "round").symlink_to(directory / "round")
    with pytest.raises(UnknownCheckpoint, match="round"):
        checkpoints.read(directory / "round")


def test_a_pipe_is_no_checkpoint(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NoWeights, match="pipe"):
        checkpoints.read(tmp_path / "pipe")


def test_several_files_of_weights_are_an_error_that_names_them(tmp_path: Path):
    for name in ("a.pt", "b.pt"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(UnknownCheckpoint, match=r"a\.pt, b\.pt"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", [b"no JSON", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_named(content: bytes, tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnknownCheckpoint, match=r"config\.json") as raised:
        checkpoints.read(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", "model.", "clip."],
)
def test_wrappers_of_a_training_are_removed(prefix: str, tmp_path: Path):
    state = {f"{prefix}{name}": tensor for name, tensor in TENSORS.items()}
    more = {"epoch": 1, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}}
    for wrapped in (state, {"state_dict": state} | more, {"model": {"state_dict": state}}, {"module": state} | more):
        torch.save(wrapped, tmp_path / "model.pt")
        assert load_tensors([tmp_path / "model.pt"]).keys() == TENSORS.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_an_optimizer_are_not_run(zipped: bool, tmp_path: Path):
    """Dassl saves a schedule that holds another schedule, which holds the optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    training = {"state_dict": dict(TENSORS), "scheduler": {"successor": schedule}}
    torch.save(training, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    tensors = load_tensors([tmp_path / "model.pt"])
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_wrappers_of_inner_layers_are_removed(tmp_path: Path):
    torch.save({"layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.up": torch.ones(2)}, tmp_path / "m.pt")
    assert load_tensors([tmp_path / "m.pt"]).keys() == {"layers.0.up"}


def test_an_archive_read_without_its_program_equals_torch_jit(tmp_path: Path):
    torch.manual_seed(0)
    file = scripted(tmp_path)
    want = torch.jit.load(str(file)).state_dict()
    tensors = torchscript.read(file)
    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in want.items())


def test_an_archive_is_memory_mapped(tmp_path: Path):
    big = Holder()
    big.inner.weight = torch.nn.Parameter(torch.ones(1024, 1024))  # 4 MB
    torch.jit.script(big).save(str(tmp_path / "model.pt"))
    tracemalloc.start()
    tensors = torchscript.read(tmp_path / "model.pt")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors["inner.weight"].sum() == 1024**2
    assert most < 1e6


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), Holder(), {"model": torch.nn.Linear(2, 2)}])
def test_a_pickled_module_is_an_error_that_names_its_class(value: object, tmp_path: Path):
    torch.save(value, tmp_path / "model.pt")
    module = value["model"] if isinstance(value, dict) else value
    refused(tmp_path / "model.pt", f"asks for {type(module).__module__}.", "as safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 605157884\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", POINTER, "is a Git LFS pointer"),
        ("config.json", POINTER, "is a Git LFS pointer"),
        ("tokenizer.json", POINTER, "is a Git LFS pointer"),
        ("model.safetensors", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("model.safetensors", b"", "is empty"),
        ("config.json", b"", "is empty"),
        ("model.safetensors", b"GGUF\x03" + bytes(60), "is a GGUF file"),
        ("model.safetensors", b"\x08\x08\x12\x07pytorch", "is an ONNX file"),
        ("model.safetensors", b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
        ("model.safetensors", b"\x1f\x8b\x08" + bytes(60), "is compressed by gzip"),
        ("model.safetensors", None, "holds no file of weights; expected model.safetensors, or one that ends in"),
        ("config.json", None, "its config.json says model_type None; expected clip"),
    ],
)
def test_a_file_of_another_kind_is_named(name: str, content: bytes | None, message: str, damaged):
    directory, error_of = damaged
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
        message = f"{name} {message}"
    assert message in error_of(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "its config.json says model_type 'bert'; expected clip"),
        ({"vision_config": [1]}, "config.json: vision_config is [1]; expected an object"),
        ({"vision_config": {"num_attention_heads": 0}}, "config.json: vision_config.num_attention_heads is 0"),
        ({"text_config": {"num_attention_heads": "two"}}, "config.json: text_config.num_attention_heads is 'two'"),
        ({"text_config": {"num_hidden_layers": 7}}, "config.json: text_config.num_hidden_layers is 7"),
    ],
)
def test_a_config_of_another_model_names_its_key(change: dict, message: str, damaged):
    directory, error_of = damaged
    assert message in error_of(changed(directory, directory.with_name("changed"), **change))


PATCH, SCALE = "vision_model.embeddings.patch_embedding.weight", "logit_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: t.to(torch.int8) for k, t in s.items()}, "is of int8; expected floating-point numbers"),
        (
            lambda s: s | {PATCH: s[PATCH].permute(0, 2, 3, 1)},
            f"{PATCH} has the shape [32, 8, 8, 3]; expected [width, 3",
        ),
        (lambda s: {k: t for k, t in s.items() if k != SCALE}, f"lacks 1 tensors, for example {SCALE}"),
        (lambda s: {f"base_model.{k}.lora_A": t for k, t in s.items()}, "whose 78 tensors include base_model."),
        (lambda s: s | {f"{PATCH}.absmax": torch.ones(3)}, f"for example {PATCH}.absmax"),
    ],
)
def test_weights_of_another_kind_name_the_tensor(change, message: str, damaged):
    directory, error_of = damaged
    state = load_file(directory / "model.safetensors")
    save_file({k: t.contiguous() for k, t in change(state).items()}, directory / "model.safetensors")
    assert message in error_of(directory)


def test_a_tokenizer_with_more_words_than_the_weights_have_rows_is_refused(damaged):
    directory, error_of = damaged
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(700)])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert (
        f"tokenizer has {tokenizer.get_vocab_size()} tokens, but text_model.embeddings.token_embedding.weight has 600"
        in error_of(directory)
    )


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_a_tokenizer_without_its_unknown_token_is_refused(kind: str, damaged):
    """The library reads it, and fails at the first unknown word."""
    directory, error_of = damaged
    content = json.loads((directory / "tokenizer.json").read_text())
    settings = {"type": kind, "vocab": content["model"]["vocab"], "unk_token": "[UNK]"}
    more = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    (directory / "tokenizer.json").write_text(json.dumps(content | {"model": settings | more}))
    error = error_of(directory)
    assert f"its {kind} model has no token '[UNK]' in its vocabulary" in error
    assert str(directory) in error


@pytest.mark.parametrize("name", ["iterdir", "open"])
def test_an_unreadable_file_is_not_called_damaged(name: str, damaged, monkeypatch: pytest.MonkeyPatch):
    """Simulated, because root may read every file."""
    directory, error_of = damaged
    original = getattr(Path, name)

    def refuse(path: Path, *args: object, **more: object) -> object:
        if path == (directory if name == "iterdir" else directory / "model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **more)

    monkeypatch.setattr(Path, name, refuse)
    assert "cannot be read: Permission denied" in error_of(directory)


def test_a_link_to_itself_is_no_file_of_weights(damaged):
    directory, error_of = damaged
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "model.safetensors")
    assert "holds no file of weights" in error_of(directory)


def test_another_zip_is_an_error_that_names_its_content(damaged):
    directory, error_of = damaged
    np.savez(directory / "weights.npz", a=np.ones(3))
    assert "weights.npz is a zip without data.pkl, which torch's have; it holds a.npy" in error_of(
        directory / "weights.npz"
    )


def test_an_open_clip_config_of_another_tower_is_named(tiny_open_clip: Path, damaged):
    directory, error_of = damaged
    shutil.rmtree(directory)
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_nowhere"}}}
    changed(tiny_open_clip, directory, "open_clip_config.json", **config)
    assert "open_clip_config.json: vision_cfg.timm_model_name is 'vit_nowhere'" in error_of(directory)


@pytest.fixture
def damaged(tiny_hf_clip: Path, tmp_path: Path, capsys) -> tuple[Path, Callable[[Path], str]]:
    """A copy of a checkpoint to damage, and a function that gives the one line of the export's error."""

    def error_of(path: Path) -> str:
        capsys.readouterr()
        assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(path) in err or "open_clip_config.json" in err
        return err

    return shutil.copytree(tiny_hf_clip, tmp_path / "copy"), error_of


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(pickle.dumps({"a": Payload("true")}, protocol=4)),
        lambda file: file.write_bytes(b"PK\x03\x04 cut"),
        lambda file: safetensors(file, b'{"a": ', b""),
        lambda file: torch.save({"unknown.weight": torch.ones(2)}, file),
    ],
)
@pytest.mark.parametrize("verb", ["export", "recipe"])
def test_the_command_line_prints_one_line_and_ends_with_status_2(write, verb: str, tmp_path: Path, capsys):
    file = tmp_path / "clip.pt"
    write(file)
    assert main([verb, str(file), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "clip.pt" in err
