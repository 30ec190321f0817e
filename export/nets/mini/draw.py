"""Draws `drawn/` from the torch modules: `python -m calmclip.export.nets.mini.draw`.

Run it after a change of a module, and then `calmclip.export.nets.mini.record`. A test draws them too, and compares.
"""

import onnx

from calmclip.export.borrow import untransposed
from calmclip.export.nets import Tower
from calmclip.export.nets.common.attribution import LAYERS
from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, attribution_tower, constants, graphs, towers_of
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.segmentation import masks_tower
from calmclip.export.towers.attribution import Attribution
from calmclip.export.trace import to_onnx


def traced() -> dict[str, onnx.ModelProto]:
    """The traced float graphs by role, with weights."""
    modules = load(SHIPPED, DETECTOR, MASKS)
    result = {}
    drawn = {role: (tower, getattr(modules, role)) for role, tower in towers_of({}).items()}
    drawn["masks"] = masks_tower(), modules.masks
    drawn["attribution"] = attribution_tower(None), Attribution(modules.text, LAYERS)
    for role, (tower, module) in drawn.items():
        settings = {name: getattr(tower, name) for name in Tower.__dataclass_fields__} | {"graph": None}
        model = to_onnx(Tower(**settings | {"module": module}))
        result[role] = untransposed(model) if tower.borrows else model
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
