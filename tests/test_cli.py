import argparse
import builtins
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import onnx
import pytest
from onnx import helper

from calmclip.export import flags
from calmclip.models import commands
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import describe
from calmclip.models.cli import VERBS, main, parser_of
from calmclip.models.runner import open_bundle
from calmclip.models.tasks import TASKS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_works_and_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    module, function = VERBS[verb][0].split(":")
    assert callable(getattr(import_module(module), function))
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"calmclip {verb}" in out
    assert "--json" in out


def test_help_and_a_list_of_names_load_nothing_that_a_verb_needs():
    """Torch alone takes seconds and 300 MB. The flags of `train` and `distil` are the fields of records, which need
    pydantic. The number of modules stands for the time, which tests do not measure."""
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "pydantic", "tokenizers", "fastapi", "pyarrow", "lancedb"}
    last = ["train", "distil"]
    calls = [[verb, "--help"] for verb in VERBS if verb not in last]
    calls += [
        ["--help"],
        ["--version"],
        ["plugins"],
        ["run", "mini-int8", "--help"],
        *([verb, "--help"] for verb in last),
    ]
    script = f"""
import contextlib, io, json, sys
from calmclip.models.cli import main
loaded = {{}}
for call in {calls}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(call)
    loaded[" ".join(call)] = sorted({heavy} & sys.modules.keys())
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {call: modules for call, modules in json.loads(done.stdout).items() if modules}
    assert loaded == {"train --help": ["pydantic"], "distil --help": ["pydantic"]}


def test_help_of_each_verb_loads_few_modules():
    """Of a process for each verb; the bound is what argparse and our own tables need. pydantic alone has 150."""
    script = f"""
import contextlib, io, json, os, sys
from calmclip.models import cli
counts = {{}}
for verb in {list(VERBS)}:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                cli.main([verb, "--help"])
        finally:
            os.write(write, str(len(sys.modules)).encode())
            os._exit(0)
    os.close(write)
    os.wait()
    counts[verb] = int(os.read(read, 100))
print(json.dumps(counts))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    counts = json.loads(done.stdout)
    most = {"train": 300, "distil": 300}
    assert {verb: count for verb, count in counts.items() if count > most.get(verb, 200)} == {}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_looks_for_bundles_where_the_setting_says(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("CALMCLIP_BUNDLES_DIR", raising=False)
    usual = parser_of(verb)
    flags = {"export": "out", "recipe": "out"}
    place = flags.get(verb, "bundles")
    if usual.get_default(place) is None:
        return  # it opens no bundle
    assert usual.get_default(place) == Path("models/bundles")
    monkeypatch.setenv("CALMCLIP_BUNDLES_DIR", str(tmp_path))
    assert parser_of(verb).get_default(place) == tmp_path


@pytest.mark.parametrize("value", ["-5", "1.5", "x", "1025", ""])
def test_every_verb_refuses_an_impossible_number_of_threads(value: str):
    """One type for all of them, in verbs of verbs too."""
    checked = 0
    for verb in VERBS:
        for action in threads_flags(parser_of(verb)):
            checked += 1
            with pytest.raises(argparse.ArgumentTypeError, match="not a number of threads"):
                action.type(value)
            assert (action.type("0"), action.type("1024")) == (0, 1024)
    assert checked >= 12


def threads_flags(options: argparse.ArgumentParser) -> list[argparse.Action]:
    flags = [action for action in options._actions if "--threads" in action.option_strings]
    for action in options._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for inner in action.choices.values() for flag in threads_flags(inner)]
    return flags


def test_help_says_what_the_registered_plug_ins_say():
    """Help reads their sources and imports none."""
    assert flags.declared() == flags.imported() != []
    runnable = {name: TASKS.get(name) for name in TASKS.names() if TASKS.get(name).command}
    assert list(commands._summaries()) == [f"{name}: {task.summary}" for name, task in runnable.items()]


def test_the_front_page_names_every_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in VERBS)
    assert main([]) == 2


def test_an_unknown_verb_is_bad_usage_and_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["exprot"]) == 2
    assert "did you mean 'export'?" in capsys.readouterr().err
    assert main(["--json", "check"]) == 2
    assert "there is no verb '--json'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "package", "extra"),
    [
        ("mini", "onnx", "mini"),
        ("mini", "calmclip.export.pipeline", "mini"),  # an image without the folder
        ("./vit-b-32", "onnx", "export"),
        ("./vit-b-32", "torch", "export"),
    ],
)
def test_a_missing_extra_is_status_3_and_says_which(
    checkpoint: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object):
        if name == "calmclip.export.pipeline":
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["export", checkpoint]) == 3
    assert f"pip install -e '.[{extra}]'" in capsys.readouterr().err


def test_an_unknown_checkpoint_and_an_unknown_bundle_are_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["export", "vit-b-32", "--out", str(tmp_path)]) == 2
    assert "built-in one is 'mini'" in capsys.readouterr().err
    assert main(["show", "mini-int8", "--bundles", str(tmp_path)]) == 2
    assert "there is no bundle 'mini-int8'" in capsys.readouterr().err


def test_show_and_check_and_run_and_bench_answer_in_json(tiny_bundles: Path, photographs, capsys):
    options = ["--bundles", str(tiny_bundles), "--json"]

    def answer(*argv: str) -> dict:
        assert main([*argv, *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert answer("show") == {"bundles": ["tiny-float", "tiny-int8"]}
    shown = answer("show", "tiny-int8")
    assert shown["manifest"]["name"] == "tiny-int8"
    assert shown["embedding_digest"] == open_bundle(tiny_bundles / "tiny-int8").bundle.embedding_digest
    assert main(["show", "tiny-int8", *options[:2]]) == 0
    assert f"embeds   {shown['embedding_digest']}" in capsys.readouterr().out.splitlines()
    assert answer("check", "tiny-int8")["passed"] is True
    cat = str(photographs["cat"])
    ranked = answer("run", "tiny-int8", "classify", cat, "--label", "a cat", "--label", "a dog")["answers"][0][
        "classify"
    ]
    assert sum(row["score"] for row in ranked) == pytest.approx(1.0)
    assert len(answer("run", "tiny-int8", "embed", cat, "--text", "two dogs")["answers"]) == 2
    timed = answer("bench", "tiny-int8", "--against", "tiny-float", "--rounds", "3")
    assert {role: len(sides) for role, sides in timed["latency_ms"].items()} == {"image": 2, "text": 2}
    assert all(0 < mb < 100 for mb in timed["resident_mb"])
    assert len(timed["resident_mb"]) == 2


@pytest.mark.parametrize("verb", ["check", "bench", "run", "eval"])
def test_the_op_library_is_used_as_the_environment_and_then_the_flag_say(
    verb: str, tiny_bundles: Path, photographs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr("calmclip.models.ops.build.FOLDER", tmp_path)  # an empty folder
    more = {"bench": ["--rounds", "2"], "run": ["embed", str(photographs["cat"])], "eval": ["retrieval"]}
    argv = [verb, "tiny-int8", *more.get(verb, []), "--bundles", str(tiny_bundles)]
    if verb == "eval":
        (tmp_path / "captions.json").write_text('{"a.jpg": ["a"]}')
        argv += ["--data", str(tmp_path)]
    error = "no op library is built, and CALMCLIP_OPS=required"
    monkeypatch.setenv("CALMCLIP_OPS", "required")
    assert main(argv) == 2
    assert error in capsys.readouterr().err
    assert verb == "eval" or main([*argv, "--ops", "off"]) == 0  # the eval has no pictures
    monkeypatch.delenv("CALMCLIP_OPS")
    assert main([*argv, "--ops", "required"]) == 2
    assert error in capsys.readouterr().err
    for source in ("flag", "environment"):
        monkeypatch.setenv("CALMCLIP_OPS", "nonsense" if source == "environment" else "")
        with pytest.raises(SystemExit) as stopped:
            main([*argv, *(["--ops", "nonsense"] if source == "flag" else [])])
        assert stopped.value.code == 2
        assert "'nonsense' is not one of auto, required, all, off" in capsys.readouterr().err


def test_bench_of_a_bundle_against_itself_without_the_op_library(
    tiny_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    argv = ["bench", "tiny-int8", "--rounds", "2", "--bundles", str(tiny_bundles), "--json", "--against-ops"]
    assert main([*argv, "off"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["bundles"] == ["tiny-int8 (ops auto)", "tiny-int8 (ops off)"]
    assert {len(sides) for sides in timed["latency_ms"].values()} == {2}
    monkeypatch.setattr("calmclip.models.ops.build.FOLDER", tmp_path)
    assert main([*argv, "required"]) == 2
    assert "no op library is built" in capsys.readouterr().err


def test_check_fails_with_status_1_when_a_graph_breaks_its_promise(tiny_bundles: Path, tmp_path: Path, capsys):
    """The vectors of the bundle are not unit vectors; all hashes are right."""
    copy = Path(shutil.copytree(tiny_bundles / "tiny-float", tmp_path / "tiny-float"))
    model = onnx.load(copy / "image.onnx")
    last = next(n for n in model.graph.node if "image_embeds" in n.output)
    last.output[0] = "unit"
    model.graph.initializer.append(helper.make_tensor("two", onnx.TensorProto.FLOAT, [], [2.0]))
    model.graph.node.append(helper.make_node("Mul", ["unit", "two"], ["image_embeds"]))
    onnx.save(model, copy / "image.onnx")
    describe(copy, Manifest.model_validate_json((copy / "bundle.json").read_text()))
    assert main(["check", str(copy)]) == 1
    assert "FAIL image: image_embeds rows are unit vectors" in capsys.readouterr().out


def test_check_of_a_changed_byte_names_the_file(tiny_bundles: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(tiny_bundles / "tiny-int8", tmp_path / "tiny-int8"))
    data = bytearray((copy / "text.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "text.onnx").write_bytes(data)
    assert main(["check", str(copy)]) == 1
    assert re.search(r"^FAIL .*text\.onnx has sha256", capsys.readouterr().out, re.MULTILINE)


def test_eval_prints_int8_beside_the_float_bundle_sealed_with_it(
    tiny_bundles: Path, tmp_path: Path, photographs, capsys
):
    (tmp_path / "images").mkdir()
    rows = []
    for name in ("cat", "coffee"):
        shutil.copy(photographs[name], tmp_path / "images")
        rows.append({"file": photographs[name].name, "label": name})
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    argv = ["eval", "tiny-int8", "zero_shot", "--data", str(tmp_path), "--bundles", str(tiny_bundles)]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [bundle["name"] for bundle in result["bundles"]]
    assert names == [*result["figures"][0]["values"]] == ["tiny-int8", "tiny-float"]
    assert result["counts"] == {"pictures": 2, "labels": 2}
    assert main([*argv, "--against", "tiny-flaot"]) == 2
    assert "did you mean 'tiny-float'?" in capsys.readouterr().err


def test_the_printed_recipe_reads_back_as_the_same_recipe(tiny_hf_clip: Path, tmp_path: Path, capsys):
    assert main(["recipe", str(tiny_hf_clip), "--dimensions", "4,8"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["dimensions"] == [4, 8]
    (tmp_path / "r.toml").write_text(text)
    assert main(["recipe", str(tiny_hf_clip), "--recipe", str(tmp_path / "r.toml")]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("lengths", ["8,16", "8,4", "", "8;4"])
def test_dimensions_that_cannot_hold_are_refused_before_the_export(tiny_hf_clip: Path, lengths: str, capsys):
    with contextlib.suppress(SystemExit):  # argparse refuses what are no numbers
        assert main(["recipe", str(tiny_hf_clip), "--dimensions", lengths]) == 2
    assert "below 16" in (said := capsys.readouterr().err) or "no list of numbers, such as 64,128,256" in said


def test_export_takes_the_evals_of_the_report(tiny_hf_clip: Path, tmp_path: Path, capsys):
    argv = ["recipe", str(tiny_hf_clip), "--json", "--eval"]
    (tmp_path / "labels.json").write_text('[{"file": "a.jpg", "label": "a"}]')
    assert main([*argv, f"zero_shot={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["evals"] == {"zero_shot": str(tmp_path)}
    for value, error in (
        (f"zero_shoot={tmp_path}", "did you mean 'zero_shot'?"),
        (f"zero_shot={tmp_path / 'gone'}", "gone/labels.json cannot be read"),
        (f"retrieval={tmp_path}", "captions.json cannot be read"),  # the folder has labels and no captions
        (f"detection={tmp_path}", "it measures detect, but clip serves classify, embed, raw"),
    ):
        assert main([*argv, value]) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit):  # argparse refuses the form
        main([*argv, str(tmp_path)])
    assert "is not NAME=DIR" in capsys.readouterr().err


def test_plugins_lists_each_family(capsys: pytest.CaptureFixture[str]):
    assert main(["plugins", "--json"]) == 0
    families = json.loads(capsys.readouterr().out)
    assert {"cosine", "sigmoid"} <= set(families["heads"])
    tasks = {
        "anomaly",
        "classify",
        "compress",
        "embed",
        "detect",
        "enhance",
        "explain",
        "rank",
        "raw",
        "segment",
        "tag",
    }
    assert tasks == set(families["tasks"])
    assert {"mini", "clip"} <= set(families["nets"])
    assert all(families.values()), "an empty family is printed"
