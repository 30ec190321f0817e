"""A bundle's answers, and the outputs of every node of our operators: the same script on this processor and on an
emulated one.

    python tests/aarch64_bundle.py LIBRARY BUNDLE OUT FEEDS

LIBRARY: the folder of the op library. FEEDS: an npz file of the nodes' inputs; it is written if it does not exist.
OUT, an npz file: `answers`; ROLE/NODE OUTPUT; "from ROLE/OUTPUT", a tower's answers from its first node of ours on;
"before ROLE/NAME", what ONNX Runtime computes before that node.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from calmclip.export.samples import pictures, texts
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.ops import build
from calmclip.models.ops.library import find
from calmclip.models.ops.spec import DOMAIN
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.runtime.session import Session, SessionOptions

PICTURES, TEXTS = 3, 6
ROLES = "image", "text"
OUT = " of the node"  # an output's name: the name itself is an input of the next node


def answers(bundle: Path) -> Any:
    return open_bundle(bundle, ops="required", threads=1).embed(
        texts=texts()[:TEXTS], images=pictures()[:PICTURES], threads=0
    )


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    library = find("required")
    assert library is not None
    options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def record(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    """The fed inputs of every node of ours, by name, when the graph answers ``feeds``."""
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted = {name: None for node in ours(model) for name in node.input if name and name not in constants}
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {output.name for output in whole.graph.output} | {entry.name for entry in whole.graph.input}
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    names = [output.name for output in whole.graph.output]
    values = dict(zip(names, session(whole).run(names, feeds), strict=True)) | feeds
    return {name: values[name] for name in wanted} | {f"fed {name}": value for name, value in feeds.items()}


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def outputs(model: onnx.ModelProto, values: dict[str, Any]) -> dict[str, Any]:
    """Every output of every node of ours, when its own inputs are ``values``, whatever the nodes before it answer."""
    nodes = ours(model)
    parts = onnx.ModelProto()
    parts.CopyFrom(model)
    del parts.graph.node[:], parts.graph.input[:], parts.graph.output[:], parts.graph.value_info[:]
    for node in nodes:
        part = parts.graph.node.add()
        part.CopyFrom(node)
        part.output[:] = [name and name + OUT for name in node.output]
        parts.graph.output.extend(onnx.ValueInfoProto(name=name) for name in part.output if name)
    values = {name: value for name, value in values.items() if not name.startswith("fed ")}
    for name, value in values.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        parts.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    names = [output.name for output in parts.graph.output]
    results = dict(zip(names, session(parts).run(names, values), strict=True))
    return {f"{node.op_type} {name}": results[name + OUT] for node in nodes for name in node.output if name}


def entries(model: onnx.ModelProto, values: dict[str, Any]) -> dict[str, Any]:
    """The ``values`` of tensors that depend on no node of ours."""
    behind: set[str] = set()
    for node in model.graph.node:
        if node.domain == DOMAIN or behind & set(node.input):
            behind |= set(node.output)
    return {name: value for name, value in values.items() if name not in behind and not name.startswith("fed ")}


def without_stem(model: onnx.ModelProto, values: dict[str, Any]) -> dict[str, Any]:
    """The graph's outputs from the first nodes of ours on, whose inputs are ``values``.

    Before them ONNX Runtime computes in float32, and adds in another order on every instruction set.
    """
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    before = entries(model, values)
    del rest.graph.node[:], rest.graph.input[:], rest.graph.value_info[:]
    needed = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output) - set(before):
            kept.append(node)
            needed |= set(node.input)
    rest.graph.node.extend(reversed(kept))
    made = {name for node in kept for name in node.output}
    kinds = {entry.name: entry for entry in model.graph.input}
    for name, value in before.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        rest.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    missing = [name for name in kinds if name in needed and name not in before and name not in made]
    rest.graph.input.extend(kinds[name] for name in missing)
    names = [output.name for output in rest.graph.output]
    fed = before | {name: values[f"fed {name}"] for name in missing}
    return dict(zip(names, session(rest).run(names, fed), strict=True))


def feeds_of(bundle: Path) -> dict[str, dict[str, Any]]:
    """What the towers get for a picture and for some texts."""
    seen: dict[str, dict[str, Any]] = {}

    class Listening(Session):
        def run(self, feeds: Any) -> Any:
            seen.setdefault(self.path.stem, dict(feeds))
            return super().run(feeds)

    opened, options = Bundle(read(bundle)), SessionOptions(threads=1, ops="required")
    towers = {role: opened.graph(role) for role in ROLES}
    sessions = {role: Listening(bundle / graph.file, graph, options) for role, graph in towers.items()}
    Runner(opened, options, sessions=sessions).embed(texts=texts()[:2], images=pictures()[:1], threads=0)
    return seen


def main(library: Path, bundle: Path, out: Path, recorded: Path) -> None:
    build.FOLDER = library
    models = {role: onnx.load(bundle / f"{role}.onnx") for role in ROLES}
    if not recorded.is_file():
        feeds = feeds_of(bundle)
        values = {f"{r}/{n}": v for r, model in models.items() for n, v in record(model, feeds[r]).items()}
        np.savez(recorded, **values)
    made: dict[str, Any] = {"answers": answers(bundle)}
    with np.load(recorded) as file:
        for role, model in models.items():
            values = {n.removeprefix(f"{role}/"): file[n] for n in file.files if n.startswith(f"{role}/")}
            made |= {f"{role}/{name}": value for name, value in outputs(model, values).items()}
            made |= {f"from {role}/{name}": value for name, value in without_stem(model, values).items()}
            fed = {name.removeprefix("fed "): value for name, value in values.items() if name.startswith("fed ")}
            computed = entries(model, record(model, fed))
            made |= {f"before {role}/{name}": value for name, value in computed.items()}
    np.savez(out, **made)
    used = find("required")
    assert used is not None
    print(*sorted(set(used.isas.values())))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
