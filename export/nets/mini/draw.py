"""Draws `drawn/` from the torch modules: `python -m calmclip.export.nets.mini.draw`.

Run it after a change of a module, and then `calmclip.export.nets.mini.record`. A test draws them too, and compares.
"""

import onnx
import torch

from calmclip.export.borrow import untransposed
from calmclip.export.nets import Tower
from calmclip.export.nets.common.attribution import LAYERS
from calmclip.export.nets.mini import (
    DETECTOR,
    MASKS,
    SHIPPED,
    attribution_tower,
    constants,
    graphs,
    minilm,
    multilingual,
    towers_of,
)
from calmclip.export.nets.mini.facts import E5_LAYERS, WIDTH
from calmclip.export.nets.mini.modules import load
from calmclip.export.nets.mini.segmentation import masks_tower
from calmclip.export.nets.mini.towers import TextTower
from calmclip.export.towers.attribution import Attribution
from calmclip.export.trace import to_onnx
from calmclip.models.flow import Array

STAND_IN = 64  # pieces


def traced() -> dict[str, onnx.ModelProto]:
    """The traced float graphs by role, with weights."""
    modules = load(SHIPPED, DETECTOR, MASKS)
    drawn = {role: (tower, getattr(modules, role)) for role, tower in towers_of({}).items()}
    drawn["masks"] = masks_tower(), modules.masks
    drawn["attribution"] = attribution_tower(None), Attribution(modules.text, LAYERS)
    return {role: _traced(tower, module) for role, (tower, module) in drawn.items()}


def languages() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The graph of many languages, traced with random weights and few pieces, and these weights: the package with the
    real ones may be absent, and the structure does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    module = TextTower(minilm.MiniLM(E5_LAYERS, STAND_IN), torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)).eval()
    for tensor in module.requires_grad_(False).parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    constants = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    model = _traced(multilingual.tower(None), module)
    for value in [value for value in model.graph.value_info if value.name in constants]:
        model.graph.value_info.remove(value)  # it states the number of pieces
    return model, constants


def _traced(tower: Tower, module: torch.nn.Module) -> onnx.ModelProto:
    settings = {name: getattr(tower, name) for name in Tower.__dataclass_fields__} | {"graph": None}
    model = to_onnx(Tower(**settings | {"module": module}))
    return untransposed(model) if tower.borrows else model


def main() -> None:
    arrays, models = constants(SHIPPED, DETECTOR, MASKS), traced()
    models[multilingual.NAME], arrays[multilingual.NAME] = languages()
    for role, model in models.items():
        path = graphs.FOLDER / f"{role}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(graphs.emptied(model, arrays[role]).SerializeToString(deterministic=True))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
