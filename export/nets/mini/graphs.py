"""The float graphs of the built-in model: their structure ships in `drawn/`, without the weights.

A constant of `LEAST` bytes or more is external there, and so is a smaller one with the name of a parameter: its
location is the name of an array of `parameters`, and the key `transposed` says that the graph holds the array's
transpose. `draw` writes these files from the torch modules.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from calmclip.export import light
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array

FOLDER = Path(__file__).with_name("drawn")
LEAST = 256  # bytes


def filled(role: str, parameters: Mapping[str, Array]) -> onnx.ModelProto:
    """The float graph ``role`` with its constants."""
    model = onnx.load(FOLDER / f"{role}.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            array = parameters[entry["location"]]
            array = np.ascontiguousarray(array.T if "transposed" in entry else array)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def emptied(model: onnx.ModelProto, parameters: Mapping[str, Array]) -> onnx.ModelProto:
    """``model`` with names in place of weights. Raises `ExportError` for a large constant that is none of
    ``parameters``."""
    places: dict[tuple[tuple[int, ...], bytes], tuple[str, bool]] = {}
    for name, array in parameters.items():
        places.setdefault((array.shape, array.tobytes()), (name, False))
        places.setdefault((array.T.shape, np.ascontiguousarray(array.T).tobytes()), (name, True))
    empty = light.lighten(model, LEAST)
    for tensor in empty.graph.initializer:
        if tensor.name in parameters and tensor.data_location != onnx.TensorProto.EXTERNAL:  # a small one
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    for tensor, whole in zip(empty.graph.initializer, model.graph.initializer, strict=True):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            array = numpy_helper.to_array(whole)
            if (array.shape, array.tobytes()) not in places:
                raise ExportError(f"the constant {tensor.name} {list(array.shape)} is no parameter, nor its transpose")
            name, transposed = places[array.shape, array.tobytes()]
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=name)
            if transposed:
                tensor.external_data.add(key="transposed", value="1")
    return empty
