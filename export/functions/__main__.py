"""`python -m calmclip.export.functions`: write the models in models/ops/probes.

Run it after a function or a probe has changed.
"""

from calmclip.export.functions import alone
from calmclip.models.ops.check import FOLDER
from calmclip.models.ops.table import TABLE

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for row in TABLE:
        for probe in row.probes:
            graph = row.graph(probe)
            model = alone(row.op, graph.inputs, graph.outputs, probe.attributes)
            (FOLDER / graph.file).write_bytes(model.SerializeToString(deterministic=True))
