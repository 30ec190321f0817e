"""The only file of models and service that imports onnxruntime: threads, providers, and errors that name the graph."""

from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from calmclip.models.bundle.manifest import Graph, fits
from calmclip.models.errors import BadRequest, BundleInvalid
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Mode, find

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
# What ONNX Runtime is asked not to do to a graph: it puts the weights of a convolution or a Gemm between 8 bits into 8
# bits too, in one scale, also where a graph has them in float because those cost too much.
AS_WRITTEN = ("WeightBiasQuantization",)


@dataclass(frozen=True)
class SessionOptions:
    """``threads``: intra-op threads, 0 = one per core. ``profile``: a file prefix for ONNX Runtime's profiler.

    ``ops``: whether the op library is used (auto: where there is one), see `calmclip.models.ops.library.find`.
    """

    threads: int = 0
    profile: str | None = None
    ops: Mode = "auto"


class Session:
    """One graph, loaded. `run` may be called from several threads at once.

    Weights that lie in a file of their own are found beside the graph; ONNX Runtime (since 1.24.1) refuses a
    graph that points out of its folder. Raises `BundleInvalid` for it, for a graph that does not load, and for
    one whose inputs and outputs are not the manifest's; `OpsLibraryMissing` as `library.find` does.
    """

    def __init__(self, path: Path, graph: Graph, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        self.graph = graph
        self.path = path
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        # Its arena keeps the most a run ever took, for each graph; without it the same speed, and 40 MB less.
        settings.enable_cpu_mem_arena = False
        settings.log_severity_level = 4  # fatal only: errors are raised, warnings are about its own optimizer
        # Spinning threads win microseconds and burn the cores that decode pictures.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if options.profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = options.profile
        if library := find(options.ops):
            settings.register_custom_ops_library(str(library.path))
        try:
            self._session = ort.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"], disabled_optimizers=list(AS_WRITTEN)
            )
        except Exception as error:  # its exception types are not public
            raise BundleInvalid(f"{path} does not load in ONNX Runtime {ort.__version__}: {error}") from None
        for kind, promised, nodes in (
            ("input", graph.inputs, self._session.get_inputs()),
            ("output", graph.outputs, self._session.get_outputs()),
        ):
            found = {node.name: node for node in nodes}
            if found.keys() != promised.keys():
                raise BundleInvalid(f"{path} has the {kind}s {sorted(found)}; the manifest promises {sorted(promised)}")
            for name, tensor in promised.items():
                dtype, shape = _DTYPES.get(found[name].type, found[name].type), _shape(found[name])
                if dtype != tensor.dtype or (shape and not fits(shape, tensor.shape)):
                    raise BundleInvalid(
                        f"{path} has the {kind} {name!r} as {dtype} {list(shape)}; "
                        f"the manifest promises {tensor.dtype} {list(tensor.shape)}"
                    )

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Arrays by input name -> arrays by output name. Raises `BadRequest` for feeds the graph does not take.

        What else goes wrong in ONNX Runtime rises as it is, with a note that names the graph.
        """
        names = list(self.graph.outputs)
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except InvalidArgument as error:
            shapes = {name: (str(a.dtype), a.shape) for name, a in feeds.items()}
            raise BadRequest(f"graph {self.path.name} refused {shapes}: {error}") from None
        except Exception as error:  # no memory, a broken kernel: not the caller's doing
            error.add_note(f"in graph {self.path}")
            raise

    def end_profiling(self) -> str:
        """Path of the profile written; only with ``SessionOptions.profile``."""
        return str(self._session.end_profiling())


def _shape(node: ort.NodeArg) -> tuple[int | str, ...]:
    """Dimensions as a manifest writes them; () where the graph does not say its rank."""
    return tuple(d if isinstance(d, int) and d > 0 else str(d) for d in node.shape or ())


def versions() -> dict[str, str]:
    return {"onnxruntime": ort.__version__}
