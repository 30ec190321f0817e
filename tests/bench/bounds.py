"""What bounds do to answers without faults, on held-out captions:

    python -m tests.bench.bounds --data DIR [--bundles models/bundles]

``DIR`` holds captions.json, picture -> captions (Flickr8k, dev split); of 120 pictures the first
caption counts.
Bounds come from 64 texts that ship. Printed: cosine between the graph `text` with and without bounds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx

from calmclip.export import light, samples
from calmclip.export.resilience.bounds import insert, sites
from calmclip.export.resilience.calibrate import bounds, forms, observe
from calmclip.models.ops.library import find
from calmclip.models.runner import open_bundle

CASES = (("clamp", 0.0), ("zero", 0.0), ("zero", 0.5), ("zero", 1.0))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    args = options.parse_args()
    captions = json.loads((args.data / "captions.json").read_text(encoding="utf-8"))
    held_out = [texts[0] for texts in captions.values()][:120]
    library = find()
    for name in ("mini-int8", "mini-float"):
        bundle = open_bundle(args.bundles / name, threads=1).bundle
        model, preparer = onnx.load(bundle.directory / bundle.graph("text").file), bundle.text("text")
        feeds, others = ([preparer.prepare([text]) for text in texts] for texts in (_calibration(), held_out))
        places = sites(model)
        seen = observe(model, feeds, places, [library])
        plain = light.Session(model, threads=1, library=library)
        truth = np.concatenate([plain.run(None, feed)[0] for feed in others])
        for form, slack in CASES:
            how = forms(places, form)
            limits = bounds(model, places, seen, "layer", dict.fromkeys(how, slack))
            session = light.Session(insert(model, limits, how), threads=1, library=library)
            cosines = (np.concatenate([session.run(None, feed)[0] for feed in others]) * truth).sum(axis=1)
            print(
                f"{name:11s} {form:6s} slack {slack}: mean {cosines.mean():.5f}, least {cosines.min():.4f}, "
                f"under .99 {(cosines < 0.99).mean():.1%}",
                flush=True,
            )


def _calibration() -> list[str]:
    return samples.calibration_texts()[:64]


if __name__ == "__main__":
    main()
