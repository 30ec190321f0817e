"""`python -m export.functions`: print the models in models/ops/probes anew, after a function or a probe has changed."""

from export.functions import alone
from models.ops.check import FOLDER, PROBES

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for probe in PROBES:
        model = alone(probe.op, probe.graph.inputs, probe.graph.outputs, probe.attributes)
        (FOLDER / probe.graph.file).write_bytes(model.SerializeToString(deterministic=True))
