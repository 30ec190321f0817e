"""Seconds of a fit over HTTP, and what a fitted classifier costs a request.

    python -m tests.bench.fit_http [BUNDLE] [--method prototype] [--pictures DIR] [--rounds 5] [--seconds 10]

10 classes of 16 pictures each: of DIR, a folder with a folder of pictures for each class, or crops of the samples. One
server on all cores and one client, sides in turns. First a fit of all pictures in JSON, one in a form, one from a
collection that holds the same pictures, and for comparison the same pictures classified one after another. Then
classification with the fitted classifier beside zero-shot with the same labels and templates: the server's total of
`Server-Timing` in milliseconds, the median and the mean of the quickest tenth. Other load on the machine changes that
tenth little, nor does it change the processor time of the server in all threads.
"""

import argparse
import base64
import io
import os
import re
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from calmclip.models.datasets import pictures_in, read_classes
from tests.bench.alternate import alternate, machine
from tests.process import serving

ROOT = Path(__file__).parents[2]
CLASSES, SHOTS = 10, 16
Shown = list[tuple[str, bytes]]  # label and file


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?", default=ROOT / "models/bundles/mini-int8")
    options.add_argument("--method", default="prototype")
    options.add_argument("--pictures", type=Path, help="a folder for each class; default: crops of the samples")
    options.add_argument("--rounds", type=int, default=5, help="at least, of the fits")
    options.add_argument("--seconds", type=float, default=10.0, help="of the classification")
    arguments = options.parse_args()
    shown = of_folder(arguments.pictures) if arguments.pictures else of_samples()
    print(machine(0))
    print(f"{len(shown)} pictures, {sum(len(data) for _, data in shown) / len(shown) / 1e3:.0f} kB each")
    with tempfile.TemporaryDirectory() as scratch:
        deadline = {"CALMCLIP_DEADLINE_MS": "120000"}
        with serving(arguments.bundle.parent, Path(scratch) / "data", cwd=ROOT, **deadline) as (process, client, _):
            client.timeout = httpx.Timeout(120)
            measure(client, arguments, shown, process.pid)


def measure(client: httpx.Client, arguments: argparse.Namespace, shown: Shown, server: int) -> None:
    model = arguments.bundle.name
    labels = sorted({label for label, _ in shown})
    items = [{"image": {"b64": base64.b64encode(data).decode()}, "label": label} for label, data in shown]
    body = {"method": arguments.method, "model": model, "replace": True, "labels": labels}
    form: list[Any] = [(label, (f"{i}.jpg", data)) for i, (label, data) in enumerate(shown)]
    form += [(key, (None, text)) for key, text in (("method", arguments.method), ("model", model), ("replace", "true"))]
    fill(client, model, items)

    def fit(**more: Any) -> dict[str, Any]:
        return done(client.post("/v1/classifiers/bench/fit", **more)).json()  # type: ignore[no-any-return]

    one_by_one = {"labels": labels, "model": model}
    sides: dict[str, Callable[[], object]] = {
        "items": lambda: fit(json={**body, "items": items}),
        "form": lambda: fit(files=form),
        "collection": lambda: fit(json={**body, "collection": "bench", "label": "kind"}),
        "one by one": lambda: [classify(client, data, one_by_one) for _, data in shown],
    }
    wall = alternate(sides, seconds=0, least=arguments.rounds)
    long = {name: side for name, side in sides.items() if name != "collection"}  # the clock has steps of 10 ms
    used = alternate(long, seconds=0, least=arguments.rounds, clock=lambda: processor_s(server))
    for name, timing in wall.items():
        processor = f"; processor time {used[name].p50:.2f} s" if name in used else ""
        print(f"fit, {name:10s} p50 {timing.p50:.3f} s, p95 {timing.p95:.3f} s, {timing.calls} rounds{processor}")
    fitted = sides["items"]()
    assert isinstance(fitted, dict)
    report = fitted["report"]
    print(
        f"{report['method']}: {report['before']} -> {report['after']} ({report['measured']}), {report['seconds']:.4f} s"
    )
    zero_shot = {"labels": labels, "templates": fitted["templates"], "model": model}
    times: dict[str, list[float]] = {"zero-shot": [], "classifier": []}
    queries = {"zero-shot": zero_shot, "classifier": {"classifier": "bench", "model": model}}
    pictures = cycle(data for _, data in shown)
    turns: dict[str, Callable[[], object]] = {
        name: lambda name=name: times[name].append(classify(client, next(pictures), queries[name]))  # type: ignore[misc]
        for name in queries
    }
    alternate(turns, seconds=arguments.seconds, least=100)
    lows = {name: np.sort(each)[: len(each) // 10].mean() for name, each in times.items()}
    for name, each in times.items():
        p50 = np.median(each)
        print(f"classify, {name:10s} p50 {p50:.3f} ms, quickest tenth {lows[name]:.3f} ms, {len(each)} requests")
    print(f"classify, difference p50 {np.median(times['classifier']) - np.median(times['zero-shot']):+.3f} ms, "
          f"quickest tenth {lows['classifier'] - lows['zero-shot']:+.3f} ms")  # fmt: skip


def classify(client: httpx.Client, data: bytes, query: dict[str, Any]) -> float:
    """The server's total in milliseconds."""
    answer = client.post("/v1/classify", params=query, content=data, headers={"Content-Type": "image/jpeg"})
    return float(re.findall(r"total;dur=([\d.]+)", done(answer).headers["server-timing"])[0])


def processor_s(process: int) -> float:
    """User and system time of all threads so far, in steps of 10 ms."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fill(client: httpx.Client, model: str, items: list[dict[str, Any]]) -> None:
    done(client.put("/v1/collections/bench", json={"model": model}))
    for start in range(0, len(items), 32):
        some = [
            {"id": str(start + i), "image": item["image"], "meta": {"kind": item["label"]}}
            for i, item in enumerate(items[start : start + 32])
        ]
        done(client.post("/v1/collections/bench/items", json={"items": some}))


def done(answer: httpx.Response) -> httpx.Response:
    assert answer.is_success, answer.text
    return answer


def of_folder(folder: Path) -> Shown:
    classes = {name: paths[:SHOTS] for name, paths in read_classes(folder).items()}
    return [(name, path.read_bytes()) for name in [*classes][:CLASSES] for path in classes[name]]


def of_samples() -> Shown:
    """Each class is `SHOTS` random crops of a few samples, as JPEG files of 320 x 320 pixels."""
    draw = np.random.default_rng(0)
    files = pictures_in(ROOT / "export/samples")
    shown: Shown = []
    for index, path in enumerate(islice(cycle(files), CLASSES * SHOTS)):
        with Image.open(path) as image:
            side = int(min(image.size) * draw.uniform(0.7, 1))
            left, top = (int(draw.integers(length - side + 1)) for length in image.size)
            crop = image.convert("RGB").crop((left, top, left + side, top + side)).resize((320, 320))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        shown.append((f"class {index % len(files) % CLASSES}", file.getvalue()))
    return shown


if __name__ == "__main__":
    main()
