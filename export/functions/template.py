"""`local_function`: the body of an operator, from the text of its nodes."""

import onnx
from onnx import parser

from calmclip.models.ops.spec import DOMAIN, Op


def local_function(op: Op, nodes: str, opset: int = 20) -> onnx.FunctionProto:
    """The ONNX local function of ``op``. ``nodes``: in ONNX's text syntax, from the op's inputs to its outputs.
    ``opset``: 20 is the first with Gelu.

    A local function cannot raise: what the op refuses (a scale of 0, shapes that do not fit), it computes or leaves to
    ONNX Runtime.
    """
    attributes = ", ".join(_declared(name, default) for name, default in op.attributes.items())
    return parser.parse_function(f"""
<domain: "{DOMAIN}", opset_import: ["": {opset}]>
{op.name} {f"<{attributes}>" if attributes else ""} ({", ".join(op.inputs)}) => ({", ".join(op.outputs)})
{{
{nodes}
}}
""")


def _declared(name: str, default: object) -> str:
    if isinstance(default, tuple):
        return f"{name}: ints = {list(default)}"
    return f"{name}: {'float' if isinstance(default, float) else 'int'} = {default}"
