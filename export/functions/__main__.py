"""`python -m calmclip.export.functions`: write the models in models/ops/probes and models/ops/trials.

Run it after a function, a probe or a case has changed.
"""

from calmclip.export.functions import alone
from calmclip.models.ops import check, trial
from calmclip.models.ops.table import TABLE

if __name__ == "__main__":
    check.FOLDER.mkdir(exist_ok=True)
    trial.FOLDER.mkdir(exist_ok=True)
    for row in TABLE:
        for probe in row.probes:
            graph = row.graph(probe)
            model = alone(row.op, graph.inputs, graph.outputs, probe.attributes)
            (check.FOLDER / graph.file).write_bytes(model.SerializeToString(deterministic=True))
    for case in trial.CASES:
        graph, (_, constants, elsewhere) = case.graph, case.drawn()
        model = alone(case.op, graph.inputs, graph.outputs, case.attributes, constants, elsewhere)
        (trial.FOLDER / graph.file).write_bytes(model.SerializeToString(deterministic=True))
