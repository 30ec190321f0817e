"""A text tower on texts of 16 tokens against the same texts padded to the context of 77.

    python -m tests.bench.text_length [--threads 1] [--bundles DIR --name vit-b-32] [--seconds 5]

Without ``--bundles``, CLIP ViT-B/32 with random weights is written by transformers and exported, which takes minutes.
Both sides run the same graph. A graph of fixed length, as CLIP's authors and open_clip trace it, computes the same as
the 77-token side. The figure after the 77-token side says how many times faster the short side is. The largest
difference between the vectors of both sides is printed too.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
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
    options.add_argument("--bundles", type=Path, help="folder of NAME-float and NAME-int8")
    options.add_argument("--name", default="vit-b-32")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = arguments.bundles or _exported(Path(scratch), arguments.name)
        print(machine(arguments.threads))
        for kind in ("float", "int8"):
            runner = open_bundle(bundles / f"{arguments.name}-{kind}", threads=arguments.threads)
            for batch in BATCHES:
                print(f"{kind:6s} batch {batch:3d}  {_sides(runner, batch, arguments.seconds)}", flush=True)


def _sides(runner: Runner, batch: int, seconds: float) -> str:
    session = runner.session("text")
    short = runner.bundle.text().prepare([TEXT] * batch)["ids"]
    if short.shape != (batch, 16):
        raise SystemExit(f"{TEXT!r} has {short.shape[1]} tokens with this bundle's tokenizer; expected 16")
    padded = np.concatenate([short, np.zeros((batch, 77 - 16), np.int64)], axis=1)
    sides = {"16 tokens": short, "77 tokens": padded}

    def run(ids: Array) -> Array:
        return session.run({"ids": ids})["text_embeds"]

    far = np.abs(run(short) - run(padded)).max()
    times = alternate({name: partial(run, ids) for name, ids in sides.items()}, seconds=seconds)
    return f"{line('', times, '16 tokens').strip()}   largest difference {far:.1e}"


def _exported(scratch: Path, name: str) -> Path:
    write("ViT-B-32", scratch / name)
    command = ["export", str(scratch / name), "--out", str(scratch / "bundles"), "--name", name, "--keep-float"]
    subprocess.run([sys.executable, "-m", "calmclip.models.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return scratch / "bundles"


if __name__ == "__main__":
    main()
