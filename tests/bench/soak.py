"""Half an hour of mixed requests: does memory grow, and does every request get its answer?

    python -m tests.bench.soak [--bundle mini-int8] [--minutes 30] [--warm-minutes 5] [--per-second 15]

Requests classify, embed and detect in pictures of many sizes, and store, overwrite, delete and search texts; some
pictures are broken. RSS is read every five seconds; a line is fitted to the values after the warm-up. Exit 1 if it
rises by more than one per cent per hour, or if a status differs from the expected one.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.bench.http import Server, default_picture

BUNDLES = Path(__file__).parents[2] / "models" / "bundles"
WORDS = ["cat", "dog", "beach", "mountain", "red car", "bicycle", "people", "kitchen", "snow", "bird"]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--bundle", default="mini-int8")
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--warm-minutes", type=float, default=5)
    options.add_argument("--per-second", type=float, default=15)
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    counts: Counter[str] = Counter()
    memory: list[tuple[float, int]] = []
    bundle = BUNDLES / arguments.bundle
    with tempfile.TemporaryDirectory() as data, Server(bundle, arguments.threads, Path(data)) as server:
        start = time.monotonic()
        end = start + arguments.minutes * 60
        pause_s = 4 / arguments.per_second
        workers = [threading.Thread(target=work, args=(server.port, at, end, pause_s, counts)) for at in range(4)]
        for worker in workers:
            worker.start()
        while time.monotonic() < end:
            time.sleep(5)
            memory.append((time.monotonic() - start, server.memory_mb() or 0))
        for worker in workers:
            worker.join()
    warm = np.array([(at / 3600, mb) for at, mb in memory if at > arguments.warm_minutes * 60])
    slope = np.polyfit(warm[:, 0], warm[:, 1], 1)[0] / warm[0, 1]
    every = max(1, len(memory) // 15)
    result = {
        "minutes": arguments.minutes,
        "requests": dict(counts),
        "rss_mb": [mb for _, mb in memory[::every]],
        "rss_mb_warm_least_and_most": [int(warm[:, 1].min()), int(warm[:, 1].max())],
        "rss_per_hour": round(float(slope), 4),
    }
    print(json.dumps(result, indent=2))
    return 0 if slope < 0.01 and not any(key.startswith("wrong") for key in counts) else 1


def work(port: int, at: int, end: float, pause_s: float, counts: Counter[str]) -> None:
    rng = random.Random(at)
    pictures = [picture(rng) for _ in range(40)]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        client.put("/v1/collections/soak", json={})
        while (begin := time.monotonic()) < end:
            verb, path, body, expected = ask(rng, pictures)
            answer = client.request(verb, path, **body)
            right = answer.status_code == expected
            counts[path.partition("?")[0] if right else f"wrong: {path} {answer.status_code} {answer.text[:100]}"] += 1
            time.sleep(max(0.0, rng.uniform(0, 2) * pause_s - (time.monotonic() - begin)))


def ask(rng: random.Random, pictures: list[bytes]) -> tuple[str, str, dict[str, Any], int]:
    """-> method, path, body as arguments of httpx, expected status."""
    kind = rng.choices(
        ["classify", "embed", "text", "store", "delete", "search", "detect", "broken"], [8, 2, 2, 3, 1, 3, 1, 1]
    )[0]
    data = rng.choice(pictures)
    raw = {"content": data, "headers": {"content-type": "image/jpeg"}}
    words = "&".join(f"labels={word}+{rng.randrange(2000)}" for word in rng.sample(WORDS, 4))
    match kind:
        case "classify" | "detect":
            return "POST", f"/v1/{kind}?{words}", raw, 200
        case "broken":
            return "POST", f"/v1/classify?{words}", {**raw, "content": data[: rng.randrange(20, 200)]}, 415
        case "embed":
            return "POST", "/v1/embed", raw, 200
        case "text":
            return "POST", "/v1/embed", {"json": {"inputs": [{"text": f"{rng.random()}"} for _ in range(8)]}}, 200
        case "store":
            items = [{"id": str(rng.randrange(500)), "text": f"{rng.random()}", "meta": {"n": rng.randrange(9)}}]
            return "POST", "/v1/collections/soak/items", {"json": {"items": items}}, 200
        case "delete":
            gone = {"json": {"ids": [str(rng.randrange(500)) for _ in range(3)]}}
            return "DELETE", "/v1/collections/soak/items", gone, 200
    return "POST", "/v1/collections/soak/search", {"json": {"query": {"text": rng.choice(WORDS)}, "top_k": 10}}, 200


def picture(rng: random.Random) -> bytes:
    size = (rng.randrange(100, 2000), rng.randrange(100, 2000))
    file = io.BytesIO()
    with Image.open(io.BytesIO(default_picture())) as image:
        image.resize(size).save(file, "JPEG", quality=rng.randrange(50, 95))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
