"""Dataset mIoU of the built-in `segment` on photographs that its mask head did not see, INT8 beside float.

    python -m calmclip.export.masks --data FOLDER --half 0 --out half0.safetensors
    python -m calmclip.export.masks --data FOLDER --half 1 --out half1.safetensors
    python -m tests.bench.mask_halves --data FOLDER --bundle mini-int8 --halves half0.safetensors half1.safetensors

The bundle's graphs run as they are, but for `regions` and `masks`: for a photograph at an even place they have the head
of half0, which was trained on those at odd places, and the other way round. They run by stock ONNX Runtime, `regions`
quantized by the settings that ship; the ranges of the new head's three convolutions come from photographs that it was
trained on. `models/evals/outlined.py` defines the figure.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from calmclip import open_bundle
from calmclip.export import parity
from calmclip.export.nets.mini import DETECTOR, RANGES, SHIPPED, constants, graphs
from calmclip.export.nets.mini.facts import REGION_PIXELS
from calmclip.export.quantizers import QUANTIZERS
from calmclip.models.cache import RowCache
from calmclip.models.evals.outlined import NONE, Photograph, counted, mean_iou, read
from calmclip.models.flow import Arrays, Cached, CacheGet, CachePut, Call, drive
from calmclip.models.preprocess.image import ImagePreparer, decode
from calmclip.models.runner import Runner
from calmclip.models.tasks.segment import SegmentRequest, segment

OBSERVED = 12  # photographs of the ranges


def runs(head: Path, photographs: Sequence[Photograph], precision: str) -> Mapping[str, parity.Run]:
    """`regions` and `masks` with the mask head in ``head``."""
    arrays = constants(SHIPPED, DETECTOR, head)
    regions = graphs.filled("regions", arrays["regions"])
    if precision == "int8":
        entry = json.loads(RANGES.read_text(encoding="utf-8"))["graphs"]["regions"]
        ranges = {**entry["ranges"], **dict(_observed(regions, photographs))}
        quantizer = QUANTIZERS.get(entry["settled"]["name"])
        regions = quantizer.quantize(regions, ranges, quantizer.params.model_validate(entry["settled"]["params"]))
    masks = graphs.filled("masks", arrays["masks"])
    return {"regions": parity.onnx_run(regions, threads=1), "masks": parity.onnx_run(masks, threads=1)}


def _observed(model: onnx.ModelProto, photographs: Sequence[Photograph]) -> Iterator[tuple[str, tuple[float, float]]]:
    """The ranges of the convolutions that make the features of masks."""
    places = {node.input[1]: node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    names = [output for weight, output in places.items() if weight.startswith("masks.")]
    run = parity.onnx_run(_with_outputs(model, names), threads=1)
    preparer = ImagePreparer(REGION_PIXELS)
    answers = [run({"pixels": preparer.prepare(decode(each.path.read_bytes()))[0]}) for each in photographs[:OBSERVED]]
    for name in names:
        yield name, (min(float(a[name].min()) for a in answers), max(float(a[name].max()) for a in answers))


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    longer = onnx.ModelProto()
    longer.CopyFrom(model)
    longer.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return longer


class Driver:
    """Drives flows over a bundle with other graphs."""

    def __init__(self, runner: Runner, other: Mapping[str, parity.Run]) -> None:
        self.runner, self.other, self.rows = runner, other, RowCache(32_768)

    def ask(self, request: SegmentRequest) -> np.ndarray:
        """-> int16 [height, width]: the index of a label, or `NONE`."""
        segments = drive(segment(self.runner.bundle, request), self._call, None, self._cached)
        labels = np.full((segments.height, segments.width), NONE, np.int16)
        for each in reversed(segments.segments):
            labels[each.mask.pixels()] = each.index
        return labels

    def _cached(self, asked: CacheGet | CachePut) -> Cached:
        return self.rows.answer(self.runner.bundle.digest, asked)

    def _call(self, call: Call) -> Arrays:
        if call.graph in self.other:
            return self.other[call.graph](call.feeds)
        if call.keys is None:
            return self.runner.session(call.graph).run(call.feeds)
        part = self.rows.split(self.runner.bundle.digest, call)
        return part.complete(self.runner.session(call.graph).run(part.feeds) if part.feeds else {})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundle", type=Path, required=True)
    options.add_argument("--halves", type=Path, nargs=2, required=True)
    options.add_argument("--precisions", nargs="+", default=["int8", "float"], choices=("int8", "float"))
    options.add_argument("--every", type=int, default=1, help="measure every Nth photograph of a half alone")
    arguments = options.parse_args()
    names, photographs = read(arguments.data)
    runner = open_bundle(arguments.bundle)
    for precision in arguments.precisions:
        counts: dict[str, list[np.ndarray]] = {"present": [], "all 80": []}
        for half, head in enumerate(arguments.halves):
            driver = Driver(runner, runs(head, photographs[1 - half :: 2], precision))
            for photograph in photographs[half :: 2 * arguments.every]:
                picture = photograph.path.read_bytes()
                for kind, classes in (("present", photograph.present), ("all 80", [*range(len(names))])):
                    if not classes:
                        continue
                    index = np.array([*classes, NONE], np.int16)
                    labels = index[driver.ask(SegmentRequest(picture, [names[c] for c in classes]))]
                    counts[kind].append(counted(photograph.truth(), labels, len(names)))
        figures = ", ".join(f"{kind} {mean_iou(np.stack(rows)):.2f}" for kind, rows in counts.items())
        print(f"{precision}: {figures} ({len(counts['all 80'])} photographs)", flush=True)


if __name__ == "__main__":
    main()
