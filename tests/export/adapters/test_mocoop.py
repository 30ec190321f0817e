"""MoCoOp over a tiny CLIP with random weights. The oracle is its definition in torch, over open_clip's module."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from calmclip.export import pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.layouts.common.clip_bpe import tokenizer_json
from calmclip.export.nets import Net
from calmclip.export.recipe import load_recipe, recognise
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.heads import BoundHead
from calmclip.models.runner import Runner, open_bundle
from tests import tiny
from tests.tiny_layouts import sealed

CLASSES = ["sea_lion", "cat", "dog on a sofa", "naïve café"]
# The code splits at blanks: "itap" is two tokens and one word, " texture" one token and two words.
TEMPLATES = ["a photo of a {}", "itap of my {}", "{} texture", "a {}, a type of pet"]
DIM, WIDTH, CONTEXT = 16, 64, 77


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.openai(tmp_path_factory.mktemp("openai"))


TOKENIZER = Tokenizer.from_str(tokenizer_json().decode())


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text.replace("_", " ")).ids)


class Reference(torch.nn.Module):
    """The prompts as the paper's code builds them, from templates and class names."""

    def __init__(self, clip: Any, classes: list[str], templates: list[str], seed: int = 0) -> None:
        super().__init__()
        self.clip, self.scale = clip, clip.logit_scale.exp()
        self.ids, self.lengths, self.counts = [], [len(tokens(name)) - 2 for name in classes], []
        torch.manual_seed(seed)
        for i, template in enumerate(templates):
            before, after = (part.strip(" ") if place == 0 else part for place, part in enumerate(template.split("{}")))
            counts = [len(part.split(" ")) if part else 0 for part in (before, after)]
            rows = [tokens(f"{before} {name}{after}") for name in classes]
            ids = torch.zeros(len(classes), CONTEXT, dtype=torch.long)
            for row, filled in zip(ids, rows, strict=True):
                row[: len(filled)] = torch.tensor(filled)
            embedded = clip.token_embedding(ids)
            self.register_buffer(f"token_prefix_{i}", embedded[:, :1])
            self.register_buffer(f"token_suffix_{i}", embedded[:, 1 + counts[0] :])
            for place, count in zip(("before", "after"), counts, strict=True):
                self.register_parameter(f"ctx_{place}_{i}", torch.nn.Parameter(torch.randn(count, WIDTH)))
            self.ids.append(ids)
            self.counts.append(counts)
        self.gate = torch.nn.Linear(DIM, len(templates))
        torch.nn.init.normal_(self.gate.weight, std=4.0)
        self.w = torch.nn.Parameter(torch.randn(1, DIM))

    def bank(self) -> torch.Tensor:
        """[G, C, D]"""
        banks = []
        for i, (ids, (_, after)) in enumerate(zip(self.ids, self.counts, strict=True)):
            prefix, suffix = getattr(self, f"token_prefix_{i}"), getattr(self, f"token_suffix_{i}")
            prompts = [
                torch.cat([prefix[c], getattr(self, f"ctx_before_{i}"), suffix[c, :length],
                           getattr(self, f"ctx_after_{i}"), suffix[c, length + after :]])
                for c, length in enumerate(self.lengths)
            ]  # fmt: skip
            banks.append(self.encoded(torch.stack(prompts), ids.argmax(-1)))
        return torch.stack(banks)

    def encoded(self, prompts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        length = prompts.shape[1]
        x = prompts + self.clip.positional_embedding[:length]
        x = self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask[:length, :length]))
        return F.normalize(x[torch.arange(len(x)), ends] @ self.clip.text_projection + self.w, dim=-1)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.normalize(self.clip.encode_image(pixels), dim=-1)
        best, experts = torch.topk(self.gate(x), 2)
        mixture = torch.einsum("bk,bkcd->bcd", best.softmax(dim=1), self.bank()[experts])
        return self.scale * torch.einsum("bd,bcd->bc", x, mixture)


def state(reference: Reference, *, image: bool = True) -> dict[str, torch.Tensor]:
    """The tensors by the names of Dassl's file."""
    learnt = {f"prompt_learner.{k}": t for k, t in reference.state_dict().items() if not k.startswith("clip.")}
    tower = {f"image_encoder.{k}": t for k, t in reference.clip.visual.state_dict().items()} if image else {}
    text = reference.clip.transformer.state_dict()
    frozen = {f"text_encoder.module.transformer.{k}": t for k, t in text.items()}
    return {**learnt, **tower, **frozen, "logit_scale": reference.clip.logit_scale}


def saved(reference: Reference, file: Path) -> Path:
    """As Dassl saves it after training: the schedule holds another schedule, and this one the optimizer."""
    optimizer = torch.optim.SGD(reference.gate.parameters(), lr=0.1, momentum=0.9)
    reference.gate(torch.ones(1, DIM)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    torch.save(
        {"state_dict": state(reference), "epoch": 10, "optimizer": optimizer.state_dict(),
         "scheduler": {**schedule.state_dict(), "successor": schedule}, "val_result": None}, file,
    )  # fmt: skip
    return file


def tuned() -> Any:
    """The base with other norms in the blocks of the image tower, as FINETUNE_VIT_LN leaves it."""
    clip = tiny.openai_module()
    with torch.no_grad():
        for name, parameter in clip.visual.named_parameters():
            if ".ln_1." in name or ".ln_2." in name:
                parameter.mul_(1.3).add_(0.1)
    return clip


def named(names: list[str], file: Path) -> Path:
    file.write_text("\n".join(names) + "\n", encoding="utf-8")
    return file


def loaded(base: Path, checkpoint: Path, classes: Path, say: Any = lambda line: None) -> Net:
    params = {"checkpoint": str(checkpoint), "classes": str(classes)}
    facts = {"activation": "quick_gelu"}
    weights = pipeline.Weights.model_validate(facts)
    return pipeline.load("clip", str(base), weights, [Adapt(name="mocoop", params=params)], say)


def head(net: Net) -> BoundHead:
    assert net.classifier is not None
    plugin = net.classifier.head
    assert plugin is not None
    assets = {name: np.load(io.BytesIO(net.files[file])) for name, file in plugin.assets.items()}
    return BoundHead(plugin.name, plugin.params, assets, json.loads(net.files["labels.json"]))


@pytest.fixture(scope="module")
def learnt(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path, Path]:
    """-> the reference, its checkpoint, its class names."""
    directory = tmp_path_factory.mktemp("learnt")
    reference = Reference(tuned(), CLASSES, TEMPLATES).eval()
    return reference, saved(reference, directory / "model.pth.tar-10"), named(CLASSES, directory / "names.txt")


@torch.no_grad()
def test_logits_are_those_of_the_definition_with_random_weights(base: Path, learnt: Any):
    """The file of Dassl, its image tower, and templates whose words are not tokens."""
    (reference, checkpoint, classes), spoken = learnt, []
    net = loaded(base, checkpoint, classes, spoken.append)
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x, bound = net.towers["image"].module(pixels).numpy(), head(net)
    assert np.abs(bound.assets["bank"] - reference.bank().numpy()).max() <= 1e-5
    ours = bound.logits(x, bound.columns(bound.labels, np.empty((4, DIM), np.float32)))
    assert np.abs(ours - reference.logits(pixels).numpy()).max() <= 1e-4 * float(reference.scale)
    assert spoken == []
    assert bound.labels == tuple(CLASSES)
    assert "mocoop/model.pth.tar-10" in net.source.weights
    assert "4 experts of model.pth.tar-10, folded for 4 classes" in net.source.notes


@torch.no_grad()
def test_other_names_get_the_definition_of_a_prompt(base: Path, learnt: Any, tmp_path: Path):
    reference, spoken = learnt[0], []
    tensors = {name: tensor.contiguous() for name, tensor in state(reference).items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    short = {n.removeprefix("prompt_learner."): t for n, t in tensors.items() if "ctx_" in n or "gate" in n}
    save_file(short, tmp_path / "short.safetensors")
    names = named(["bird", "old car"], tmp_path / "names.txt")
    shift = reference.w.clone()
    for file in ("whole", "short"):  # a prompt learner alone has no prefix, and here no correction w
        reference.w.data = shift if file == "whole" else torch.zeros(1, DIM)
        bank = head(loaded(base, tmp_path / f"{file}.safetensors", names, spoken.append)).assets["bank"]
        for i, c, name in ((0, 0, "bird"), (1, 1, "old car"), (2, 1, "old car")):
            start, *words, end = tokens(name)
            rows = [reference.clip.token_embedding(torch.tensor(ids)) for ids in ([start], words, [end])]
            context = [getattr(reference, f"ctx_{place}_{i}") for place in ("before", "after")]
            prompt = torch.cat([rows[0], context[0], rows[1], context[1], rows[2]])
            want = reference.encoded(prompt[None], torch.tensor([len(prompt) - 1]))[0]
            assert np.abs(bank[i, c] - want.numpy()).max() <= 1e-5
    reference.w.data = shift
    assert [line[:43] for line in spoken] == 4 * ["the class names are not those of the training"[:43]]


@torch.no_grad()
def test_norms_alone_replace_those_of_the_base(base: Path, learnt: Any, tmp_path: Path):
    reference = learnt[0]
    kept = {n: t.contiguous() for n, t in state(reference).items() if "image_encoder" not in n or ".ln_" in n}
    save_file(kept, tmp_path / "norms.safetensors")
    net = loaded(base, tmp_path / "norms.safetensors", named(CLASSES, tmp_path / "names.txt"))
    pixels = torch.randn(2, 3, 32, 32)
    want = F.normalize(reference.clip.encode_image(pixels), dim=-1)
    assert torch.allclose(net.towers["image"].module(pixels), want, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_sealed_bundle_classifies_without_the_text_graph(base: Path, learnt: Any, photographs: Any, tmp_path: Path):
    reference, checkpoint, classes = learnt
    runner = sealed.runner(loaded(base, checkpoint, classes), tmp_path, "mixture-float")
    ranking = runner.classify(photographs["cat"])
    assert [*runner._sessions] == ["image"]
    feeds = runner.bundle.image().prepare(pipeline.calibrate.decode(photographs["cat"].read_bytes()))[0]
    want = reference.logits(torch.from_numpy(feeds)).softmax(dim=1)[0]
    by_label = {ranked.label: ranked for ranked in ranking}
    assert [by_label[name].score for name in CLASSES] == pytest.approx(want.tolist(), abs=1e-4)
    mean = F.normalize(reference.bank().mean(dim=0), dim=-1)
    cosines = F.normalize(reference.clip.encode_image(torch.from_numpy(feeds)), dim=-1) @ mean.T
    assert [by_label[name].cosine for name in CLASSES] == pytest.approx(cosines[0].tolist(), abs=1e-5)
    two = runner.classify(photographs["cat"], ["cat", "sea_lion"])
    assert {ranked.label for ranked in two} == {"cat", "sea_lion"}
    with pytest.raises(BadRequest, match="the head 'mixture' does not know the label 'bird'"):
        runner.classify(photographs["cat"], ["bird"])
    fitted, _ = runner.fit([photographs["cat"], photographs["rocket"]], ["a", "b"], "prototype")
    assert {ranked.label for ranked in runner.classify(photographs["cat"], classifier=fitted)} == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_learner.gate.bias": None}, "lacks prompt_learner.gate.bias of a MoCoOp checkpoint"),
        ({"prompt_learner.ctx_after_1": None}, "lacks prompt_learner.ctx_after_1"),
        ({"prompt_learner.ctx_before_0": torch.ones(4, 32)}, r"before_0 has the shape \[4, 32\]; .*'any', 64\]"),
        ({"prompt_learner.gate.weight": torch.ones(4, 8)}, r"gate.weight has the shape \[4, 8\]; expected \[4, 16\]"),
        ({"prompt_learner.w": torch.full((1, 16), torch.nan)}, r"w has the shape \[1, 16\]; .*, finite"),
        ({"prompt_learner.more": torch.ones(1)}, "holds prompt_learner.more, which is no tensor of MoCoOp"),
        ({"image_encoder.conv1.weight": torch.ones(128, 3, 4, 4)}, r"conv1.weight has the shape \[128, 3, 4, 4\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change: Any, says: str, base: Path, learnt: Any, tmp_path: Path):
    tensors = {**state(learnt[0]), **change}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "m.safetensors")
    with pytest.raises(UnknownCheckpoint, match=says):
        loaded(base, tmp_path / "m.safetensors", learnt[2])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n \n", "holds no class names"),
        (b"cat\ncat\n", "cat"),
        (b"\xff\xfe", "cannot be read"),
        (b"cat\n" + b"very " * 73 + b"long", "tokens; this model reads"),
    ],
)
def test_class_names_that_do_not_fit_are_named(content: bytes, says: str, base: Path, learnt: Any, tmp_path: Path):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises((BadRequest, ValueError), match=says):
        loaded(base, learnt[1], tmp_path / "names.txt")


def test_prompts_without_their_base_are_refused_with_the_command(learnt: Any):
    with pytest.raises(UnknownCheckpoint, match="export the CLIP that they were tuned over, with --mocoop"):
        recognise(str(learnt[1]))


@pytest.mark.slow
@torch.no_grad()
def test_an_int8_bundle_of_random_weights_ranks_as_float_does(
    base: Path, learnt: Any, photographs: Any, tmp_path: Path
):
    _, checkpoint, classes = learnt
    net = loaded(base, checkpoint, classes)
    adapters = [{"name": "mocoop", "params": {"checkpoint": str(checkpoint), "classes": str(classes)}}]
    recipe = load_recipe(str(base), "clip", net, name="mixture", keep_float=True, adapters=adapters)
    quantized, floats = (open_bundle(bundle.directory) for bundle in pipeline.build(recipe, tmp_path, net=net))
    report = json.loads((quantized.bundle.directory / "report.json").read_text())
    assert report["embeddings"]["image"]["cosine_mean"] >= 0.99

    def logits(runner: Runner) -> np.ndarray:
        return runner.logits([*photographs.values()])

    int8, float32 = logits(quantized), logits(floats)
    assert np.sum(int8 * float32) / np.linalg.norm(int8) / np.linalg.norm(float32) >= 0.99
