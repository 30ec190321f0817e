"""Texts as short as they are: a text tower over 16 tokens beside the same texts padded to the context of 77.

    python -m tests.bench.text_length [--threads 1] [--bundles DIR --name vit-b-32] [--seconds 5]

Without ``--bundles``: CLIP ViT-B/32 with random weights, written by transformers and exported, which takes minutes.
The graph is one and the same; a graph of fixed length, as CLIP's authors and open_clip trace it, computes what the
77-token side computes. Behind each 77-token side stands how many times faster the short one is; the largest difference
between the two sides' vectors is printed with it.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from calmclip.models.flow import Array
from calmclip.models.runner import Runner, open_bundle
from tests.bench.alternate import alternate, line, machine
from tests.bench.checkpoints import write

TEXT = "a photo of a dog that runs along the beach in the morning sun"  # 16 tokens with both ends
BATCHES = (1, 8, 32)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=5.0, help="for each line")
    options.add_argument("--bundles", type=Path, help="where NAME-float and NAME-int8 lie")
    options.add_argument("--name", default="vit-b-32")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = given.bundles or _exported(Path(scratch), given.name)
        print(machine(given.threads))
        for kind in ("float", "int8"):
            runner = open_bundle(bundles / f"{given.name}-{kind}", threads=given.threads)
            for batch in BATCHES:
                print(f"{kind:6s} batch {batch:3d}  {_sides(runner, batch, given.seconds)}", flush=True)


def _sides(runner: Runner, batch: int, seconds: float) -> str:
    session = runner.session("text")
    short = runner.bundle.text().prepare([TEXT] * batch)["ids"]
    if short.shape != (batch, 16):
        raise SystemExit(f"{TEXT!r} has {short.shape[1]} tokens here; this benchmark is of 16")
    whole = np.concatenate([short, np.zeros((batch, 77 - 16), np.int64)], axis=1)
    sides = {"16 tokens": short, "77 tokens": whole}

    def run(ids: Array) -> Array:
        return session.run({"ids": ids})["text_embeds"]

    far = np.abs(run(short) - run(whole)).max()
    times = alternate({name: lambda ids=ids: run(ids) for name, ids in sides.items()}, seconds=seconds)
    return f"{line('', times, '16 tokens').strip()}   largest difference {far:.1e}"


def _exported(scratch: Path, name: str) -> Path:
    write("ViT-B-32", scratch / name)
    command = ["export", str(scratch / name), "--out", str(scratch / "bundles"), "--name", name, "--keep-float"]
    subprocess.run([sys.executable, "-m", "calmclip.models.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return scratch / "bundles"


if __name__ == "__main__":
    main()
