"""`python -m calmclip.export.functions`: print the models in models/ops/probes anew.

Do so after a function or a probe has changed.
"""

from calmclip.export.functions import alone
from calmclip.models.ops.check import FOLDER, PROBES

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for probe in PROBES:
        model = alone(probe.op, probe.graph.inputs, probe.graph.outputs, probe.attributes)
        (FOLDER / probe.graph.file).write_bytes(model.SerializeToString(deterministic=True))
