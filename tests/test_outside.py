"""A foreign package adds a task, its endpoint, a head, an adapter and an eval without an edit of calmclip.

The package is a real distribution on disk. Its adapter negates the pictures' vectors and lets the net serve the task;
then the test calls the exported bundle over HTTP and by verbs.
"""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from calmclip import open_bundle
from calmclip.export.adapters import ADAPTERS
from calmclip.export.nets import NETS
from calmclip.export.parity import torch_run
from calmclip.export.trace import example
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.evals import EVALS
from calmclip.models.heads import HEADS
from calmclip.models.tasks import TASKS

ROOT = Path(__file__).parents[1]
MODULES = {
    "guest_adapter": """
        from dataclasses import replace
        from calmclip.export.adapters import ADAPTERS, Adapter
        from calmclip.models.bundle.manifest import FrozenModel

        class Params(FrozenModel):
            factor: float
            loud: bool = False

        def adapt(net, params, context):
            layer = net.towers["image"].module.projection
            layer.weight.data = layer.weight.data * params.factor
            return replace(net, tasks=tuple(dict.fromkeys((*net.tasks, "channel"))))

        ADAPTERS.register("guest")(Adapter(Params, adapt, {"--guest": "factor", "--loud": "loud", "--name": "loud"}))
        """,
    "guest_task": """
        from dataclasses import dataclass
        from calmclip.models.bundle.manifest import ImagePreprocess
        from calmclip.models.tasks import TASKS, Command, Task
        from calmclip.models.tasks.features import picture

        @dataclass(frozen=True)
        class ChannelRequest:
            image: object
            times: float = 1

        def channel(bundle, request):
            bundle.require("channel")
            row = (yield from picture(bundle, request.image))[0]
            return {"channel": int(row.argmax()), "most": float(row.max()) * request.times}

        command = Command(
            lambda options: options.add_argument("--times", type=float, default=1.0),
            lambda runner, given: (runner.ask("channel", ChannelRequest(path, given.times)) for path in given.pictures),
            lambda answer: f"{answer['channel']} {answer['most']:.4f}",
        )
        TASKS.register("channel")(
            Task("channel", "the strongest number of a picture's vector", ChannelRequest, channel,
                 lambda bundle, file: ChannelRequest(file), {"image": ImagePreprocess}, command=command)
        )
        """,
    "guest_endpoint": """
        from calmclip.service.asked import Asked
        from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
        from calmclip.service.schemas import Answer, PictureBody
        from guest_task import ChannelRequest, channel

        class ChannelBody(PictureBody):
            times: float = 1

        class ChannelAnswer(Answer):
            model: str
            channel: int
            most: float

        @Endpoint("POST", "/v1/channel", task="channel", scope="read", summary="The strongest channel",
                  body=ChannelBody, example={"image": {"b64": PIXEL}, "times": 2}, answer=ChannelAnswer,
                  problems=(*ENGINE, *INPUT, *PICTURE))
        async def ask(asked: Asked[ChannelBody]) -> ChannelAnswer:
            loaded = asked.bundle(asked.body.model)
            asked.check(asked.body.image)
            request = ChannelRequest(asked.body.image, asked.body.times)
            return ChannelAnswer(model=loaded.name, **await asked.run(loaded, channel(loaded.bundle, request)))
        """,
    "guest_head": """
        import numpy as np
        from calmclip.models.bundle.manifest import FrozenModel
        from calmclip.models.heads import HEADS, Asset, Fit, Head

        class Params(FrozenModel):
            sure: float = 0.75

        def fit(examples, params):  # a label's score is its part of the examples, for every picture
            return {"often": np.bincount(examples.truth, minlength=len(examples.labels)).astype(np.float32)}

        def logits(image, columns, params):
            return np.log(columns.assets["often"] * np.ones((len(image), 1), np.float32))

        def scores(logits):
            return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

        HEADS.register("guest")(Head(Params, logits, scores, {"often": Asset(("C",))}, Fit(fit)))
        """,
    "guest_eval": """
        import numpy as np
        from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Samples
        from guest_task import ChannelRequest, channel

        def predict(runner, files, params):
            answers = runner.map(channel(runner.bundle, ChannelRequest(file)) for file in files)
            return Samples({"pictures": len(files)}, {"most": np.array([answer["most"] for answer in answers])})

        def score(samples, params):
            return lambda rows: [Figure("mean of the most", float(samples.arrays["most"][rows].mean()), "")]

        def read(data, params, limit):
            return sorted(data.glob("*.jpg"))[:limit]

        EVALS.register("guest")(Eval("channel", "*.jpg", NoParams, read, predict, score))
        """,
    "guest_segmenter": """
        from calmclip.models.bundle.manifest import FrozenModel
        from calmclip.models.segmenters import SEGMENTERS, Segmenter
        from calmclip.models.segmenters.maps import compared, dense_maps, without_dense

        class Params(FrozenModel):
            scale: float = 7

        def flow(bundle, scene, params):
            maps = yield from dense_maps(bundle, scene.image, scene.windows)
            return compared(maps.patches, scene.text, scene.background, params.scale, 0, maps.frame)

        SEGMENTERS.register("guest")(Segmenter(Params, "a guest", without_dense, flow))
        """,
}
POINTS = """
[calmclip.adapters]
guest = guest_adapter
[calmclip.tasks]
channel = guest_task
[calmclip.endpoints]
POST /v1/channel = guest_endpoint
[calmclip.heads]
guest = guest_head
[calmclip.evals]
guest = guest_eval
[calmclip.segmenters]
guest = guest_segmenter
"""
SCRIPT = """
import asyncio, base64, contextlib, io, json, sys
from pathlib import Path
import httpx
from calmclip.models.cli import main
from calmclip.service import keys
from calmclip.service.scopes import SCOPES
from calmclip.service.app import create_app
from calmclip.service.monitoring.rules import INTERACTIVE
from calmclip.service.settings import Settings

bundles, data, pictures = map(Path, sys.argv[1:])

async def served(cat, rocket):
    answers = {}
    secrets = {scope: keys.add(data / "keys", scope, [scope]) for scope in SCOPES}
    app = create_app(Settings(bundles_dir=bundles, data_dir=data, threads=1, keys=data / "keys"))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        async def ask(scope, method, path, headers=None, **more):
            key = {"x-api-key": secrets.get(scope, "")}
            answer = await http.request(method, path, headers=key | (headers or {}), **more)
            return [answer.status_code, answer.json() if "json" in answer.headers["content-type"] else answer.text]
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        send = {"content": cat, "headers": {"content-type": "image/jpeg"}}
        for scope in ("nobody", *secrets):
            answers[scope] = await ask(scope, "POST", "/v1/channel?times=3", **send)
        answers["models"] = await ask("read", "GET", "/v1/models")
        pairs = ((cat, "a"), (rocket, "b"), (cat, "b"), (cat, "c"))
        items = [{"image": {"b64": base64.b64encode(picture).decode()}, "label": label} for picture, label in pairs]
        answers["fit"] = await ask("write", "POST", "/v1/classifiers/odd/fit", json={"method": "guest", "items": items})
        answers["classify"] = await ask("read", "POST", "/v1/classify?classifier=odd&labels=c&labels=b", **send)
        answers["metrics text"] = (await ask("metrics", "GET", "/metrics"))[1]
    return answers | {"spec": app.openapi(), "interactive": INTERACTIVE}

def verb(*argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*argv, "--json"]) == 0, argv
    return json.loads(out.getvalue())

bundle, cat = str(next(bundles.iterdir())), pictures / "cat.jpg"
results = asyncio.run(served(cat.read_bytes(), (pictures / "rocket.jpg").read_bytes()))
results["plugins"] = verb("plugins")
results["run"] = verb("run", bundle, "channel", str(cat), "--times", "2")
results["eval"] = verb("eval", bundle, "guest", "--data", str(pictures), "--limit", "3")
from calmclip.models.segmenters import SEGMENTERS
results["segmenter"] = [SEGMENTERS.get("guest").summary, SEGMENTERS.get("maskclip").summary]
results["torch"] = "torch" in sys.modules
print(json.dumps(results))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder in which the package is installed."""
    info = tmp_path / "site" / "guest-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    for name, text in MODULES.items():
        (tmp_path / "site" / f"{name}.py").write_text(textwrap.dedent(text))
    return tmp_path / "site"


@pytest.fixture
def bundle(site: Path, tiny_hf_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exported with the adapter, by a process that knows the package's adapter but not its task."""
    for registry in (TASKS, HEADS, EVALS, ADAPTERS):
        registry.load()  # without the package
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    for name, fresh in (("_plugins", {**ADAPTERS._plugins}), ("_homes", {**ADAPTERS._homes}), ("_loaded", False)):
        monkeypatch.setattr(ADAPTERS, name, fresh)
    monkeypatch.delitem(sys.modules, "guest_adapter", raising=False)
    (tmp_path / "recipe.toml").write_text('[quantize]\nimage = {name = "none"}\ntext = {name = "none"}\n')
    argv = ["export", str(tiny_hf_clip), "--recipe", str(tmp_path / "recipe.toml"), "--name", "g"]
    argv += ["--guest", "-1.0", "--loud", "--adapter", "guest:factor=2", "--out", str(tmp_path / "bundles")]
    assert main(argv) == 0
    (directory,) = (tmp_path / "bundles").iterdir()
    return directory


def test_each_is_listed_served_measured_and_in_openapi(
    bundle: Path, site: Path, tiny_hf_clip: Path, photographs: dict[str, Path], tmp_path: Path
):
    assert read(bundle).manifest.source.notes.endswith(
        "; adapter guest factor=-1.0 loud=True; adapter guest factor=2.0"
    )
    assert json.loads((bundle / "report.json").read_text())["recipe"]["adapters"] == [
        {"name": "guest", "params": {"factor": -1.0, "loud": True}},
        {"name": "guest", "params": {"factor": 2.0}},
    ]
    tower = NETS.get("clip").load(str(tiny_hf_clip)).towers["image"]
    feeds = {key: tensor.numpy() for key, tensor in zip(tower.inputs, example(tower), strict=True)}
    (expected,) = torch_run(tower)(feeds).values()
    runner = open_bundle(bundle)
    (vectors,) = runner.raw("image", feeds).values()
    assert np.allclose(vectors, -expected, atol=1e-5)
    assert "channel" not in TASKS.names()  # a reader without the task serves the other tasks
    assert (runner.bundle.tasks, read(bundle).manifest.tasks[-1]) == (
        ("classify", "embed", "raw", "compress", "explain", "rank", "tag"),
        "channel",
    )

    (tmp_path / "data").mkdir()
    pictures = photographs["cat"].parent
    arguments = [str(bundle.parent), str(tmp_path / "data"), str(pictures)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    row = runner.embed(images=[photographs["cat"]])[0]
    most = {"channel": int(row.argmax()), "most": pytest.approx(float(row.max()), abs=1e-6)}
    # served to a key with the scope read
    assert (results["nobody"][0], results["write"][0], results["metrics"][0]) == (401, 403, 403)
    assert results["read"] == [200, {"model": bundle.name, **most, "most": pytest.approx(3 * row.max(), abs=1e-5)}]
    # listed
    tasks = ["classify", "embed", "raw", "channel", "compress", "explain", "rank", "tag"]
    assert results["models"][1]["models"][0]["tasks"] == tasks
    families = ("adapters", "tasks", "endpoints", "heads", "evals", "segmenters")
    names = ("guest", "channel", "POST /v1/channel", "guest", "guest", "guest")
    assert all(name in results["plugins"][family] for family, name in zip(families, names, strict=True))
    # measured
    assert (
        f'calmclip_requests_total{{model="{bundle.name}",outcome="ok",task="channel"}} 1.0' in results["metrics text"]
    )
    assert "|channel|" in results["interactive"].replace('"', "|")
    # in OpenAPI
    operation = results["spec"]["paths"]["/v1/channel"]["post"]
    content = operation["requestBody"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/ChannelBody"}
    assert content["application/json"]["example"]["times"] == 2
    assert {"image/png", "multipart/form-data"} <= content.keys()
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChannelAnswer")
    assert operation["security"][0] == {"bearer": ["read"]}
    assert {"ChannelBody", "ChannelAnswer"} <= results["spec"]["components"]["schemas"].keys()
    # the head knows its labels: b has two examples, a and c have one
    assert (results["fit"][0], results["fit"][1]["head"], results["fit"][1]["params"]) == (200, "guest", {"sure": 0.75})
    ranked = [(row["label"], row["score"]) for row in results["classify"][1]["labels"]]
    assert ranked == [("b", pytest.approx(2 / 3, abs=1e-6)), ("c", pytest.approx(1 / 3, abs=1e-6))]
    # verbs
    assert results["run"]["answers"] == [{**most, "most": pytest.approx(2 * row.max(), abs=1e-5)}]
    rows = runner.embed(images=sorted(pictures.glob("*.jpg"))[:3])
    (figure,) = results["eval"]["figures"]
    assert figure["values"][bundle.name]["value"] == pytest.approx(rows.max(axis=1).mean(), abs=1e-6)
    assert results["segmenter"] == ["a guest", "each patch by its nearest text"]
    assert results["torch"] is False
