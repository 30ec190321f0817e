"""Sessions of ONNX Runtime. The only module of models and service that imports onnxruntime."""

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
# Disabled, because this optimizer quantizes float weights of a convolution or Gemm between 8-bit tensors with one
# scale, also weights that export keeps in float for accuracy.
DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)


@dataclass(frozen=True)
class SessionOptions:
    """``threads``: intra-op threads, 0 = one per core. ``profile``: a file prefix for ONNX Runtime's profiler.

    ``ops``: whether the op library is used (auto: if there is one), see `calmclip.models.ops.library.find`.
    """

    threads: int = 0
    profile: str | None = None
    ops: Mode = "auto"


@dataclass(frozen=True)
class Memory:
    """A graph in memory. ``model``: what would be in its file; ``tensors``: the data of its external initializers by
    name, which ONNX Runtime reads without a copy: they must not change."""

    model: bytes
    tensors: Arrays


class Session:
    """One loaded graph. Several threads may call `run` at once. ``memory``: read in place of the file at ``path``.

    External weights are files beside the graph; ONNX Runtime (since 1.24.1) refuses a path out of this folder. Raises
    `BundleInvalid` for a graph that does not load or whose inputs or outputs differ from the manifest;
    `OpsLibraryMissing` as `library.find`.
    """

    def __init__(
        self, path: Path, graph: Graph, options: SessionOptions | None = None, memory: Memory | None = None
    ) -> None:
        options = options or SessionOptions()
        self.graph = graph
        self.path = path
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        # The arena keeps the peak memory of each graph. Without it: the same speed, 40 MB less.
        settings.enable_cpu_mem_arena = False
        settings.log_severity_level = 4  # fatal only: errors are raised, warnings concern its optimizer
        # Spinning threads save microseconds and take CPU time from the threads that decode pictures.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if options.profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = options.profile
        if library := find(options.ops):
            settings.register_custom_ops_library(str(library.path))
        if memory:
            self._borrowed = [ort.OrtValue.ortvalue_from_numpy(array) for array in memory.tensors.values()]
            settings.add_external_initializers([*memory.tensors], self._borrowed)
        source = memory.model if memory else str(path)
        try:
            self._session = ort.InferenceSession(
                source, settings, providers=["CPUExecutionProvider"], disabled_optimizers=list(DISABLED_OPTIMIZERS)
            )
        except Exception as error:  # the exception types are not public
            raise BundleInvalid(f"{path} does not load in ONNX Runtime {ort.__version__}: {error}") from None
        for kind, promised, nodes in (
            ("input", graph.inputs, self._session.get_inputs()),
            ("output", graph.outputs, self._session.get_outputs()),
        ):
            present = {node.name: node for node in nodes}
            if present.keys() != promised.keys():
                raise BundleInvalid(
                    f"{path} has the {kind}s {sorted(present)}; the manifest promises {sorted(promised)}"
                )
            for name, tensor in promised.items():
                dtype, shape = _DTYPES.get(present[name].type, present[name].type), _shape(present[name])
                if dtype != tensor.dtype or (shape and not fits(shape, tensor.shape)):
                    raise BundleInvalid(
                        f"{path} has the {kind} {name!r} as {dtype} {list(shape)}; "
                        f"the manifest promises {tensor.dtype} {list(tensor.shape)}"
                    )

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Arrays by input name -> arrays by output name. Raises `BadRequest` for feeds that the graph does not take.

        Other errors of ONNX Runtime get a note with the graph's path.
        """
        names = list(self.graph.outputs)
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except InvalidArgument as error:
            shapes = {name: (str(a.dtype), a.shape) for name, a in feeds.items()}
            raise BadRequest(f"graph {self.path.name} refused {shapes}: {error}") from None
        except Exception as error:  # no memory, a broken kernel: not the caller's fault
            error.add_note(f"in graph {self.path}")
            raise

    def end_profiling(self) -> str:
        """Path of the profile written; only with ``SessionOptions.profile``."""
        return str(self._session.end_profiling())


def _shape(node: ort.NodeArg) -> tuple[int | str, ...]:
    """Dimensions as in a manifest; () if the graph has no rank."""
    return tuple(d if isinstance(d, int) and d > 0 else str(d) for d in node.shape or ())


def versions() -> dict[str, str]:
    return {"onnxruntime": ort.__version__}
