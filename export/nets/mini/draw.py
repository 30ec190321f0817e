"""Draws `drawn/` from the torch modules: `python -m calmclip.export.nets.mini.draw`.

Run it after a change of a module, and then `calmclip.export.nets.mini.record`. A test draws them too, and compares.
"""

import onnx

from calmclip.export.nets import Tower
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, constants, graphs, towers_of
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.segmentation import masks_tower
from calmclip.export.trace import to_onnx


def traced() -> dict[str, onnx.ModelProto]:
    """The traced float graphs by role, with weights."""
    modules = load(SHIPPED, DETECTOR, MASKS)
    result = {}
    for role, tower in {**towers_of({}), "masks": masks_tower()}.items():
        settings = {name: getattr(tower, name) for name in Tower.__dataclass_fields__} | {"graph": None}
        result[role] = to_onnx(Tower(**settings | {"module": getattr(modules, role)}))
    return result


def main() -> None:
    arrays = constants(SHIPPED, DETECTOR, MASKS)
    for role, model in traced().items():
        path = graphs.FOLDER / f"{role}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(graphs.emptied(model, arrays[role]).SerializeToString(deterministic=True))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
