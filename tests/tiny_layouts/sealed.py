"""A sealed float bundle of a net, as the pipeline writes it, without what the pipeline measures on the way."""

from pathlib import Path

from calmclip.export.nets import Net
from calmclip.export.pipeline import FLOAT, _write
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.store import seal, stage
from calmclip.models.runner import Runner, open_bundle


def runner(net: Net, out: Path, name: str) -> Runner:
    with stage(out, name) as directory:
        graphs = {role: to_onnx(tower) for role, tower in net.towers.items()}
        sealed = seal(directory, _write(net, directory, graphs, name, FLOAT), replace=False)
    return open_bundle(sealed.directory)
