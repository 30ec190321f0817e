"""The verb align. `calmclip.export.align`, with torch, is imported after the flags are read."""

import argparse
import json
import sys
from pathlib import Path

from calmclip.models.cli import parser
from calmclip.models.datasets import FORM


def align_command(argv: list[str]) -> int:
    """`calmclip align --captions FILE --images DIR`: heads for the built-in model from pairs of the user."""
    options = _parser().parse_args(argv)
    from calmclip.export.align import train

    options.command = " ".join(["calmclip align", *argv])
    result = train(options, options.json or not sys.stderr.isatty())
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"wrote {result['heads']}; loss {result['training']['first_loss']} -> {result['training']['last_loss']}")
        for name, value in result["held_out"].items():
            print(f"  {name:18s} {value}")
        checkpoint = options.out if options.out.is_absolute() else f"./{options.out}"  # "mini" is the built-in model
        print(f"export it with: calmclip export {checkpoint}")
    return 0


def _parser() -> argparse.ArgumentParser:
    options = parser("align", "Train the projections of the built-in model on captioned pictures.")
    options.add_argument("--captions", type=Path, required=True, help=f"JSON: {FORM}")
    options.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    options.add_argument(
        "--out", type=Path, default=Path("checkpoints/own"), help="folder for heads.safetensors (default %(default)s)"
    )
    options.add_argument("--start", type=Path, help="heads to start from (default: the shipped heads)")
    options.add_argument("--fresh", action="store_true", help="start from new projections; needs --names")
    options.add_argument("--names", type=Path, help="JSON of class names, WordNet bags and templates")
    options.add_argument("--name-views", type=Path, help=".npz: features of ImageNet pictures by class; needs --names")
    options.add_argument("--crops", type=Path, help=".npz: features of COCO objects; needs --names")
    options.add_argument("--held-out", type=int, default=0, help="pictures that measure recall instead of training")
    options.add_argument("--steps", type=int)
    options.add_argument("--seeds", type=int, help="runs that are averaged")
    options.add_argument("--cache", type=Path, help="folder for the pictures' features, which the next run reuses")
    return options
