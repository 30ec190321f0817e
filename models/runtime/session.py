"""Sessions of ONNX Runtime. The only module of models and service that imports onnxruntime."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from calmclip.models.bundle.manifest import Graph, fits
from calmclip.models.errors import BadRequest, BundleInvalid
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops import breakeven
from calmclip.models.ops.library import Library, Mode, find, register
from calmclip.models.runtime.lending import Lent, counted, lend

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
# Inputs of one run in one thread. The activations of more rows exceed what the C library keeps between runs: each page
# is then fetched from the kernel again, and a picture of a convolutional tower takes up to 1.4 times as long. With
# several threads a run is not divided, because each of its nodes wakes them.
RUN_BYTES = 7 << 18

_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class SessionOptions:
    """``threads``: intra-op threads, 0 = one per core. ``profile``: a file prefix for ONNX Runtime's profiler.

    ``ops``: whether the op library is used (auto: if there is one), see `calmclip.models.ops.library.find`.
    ``run_bytes``: inputs of one run, None: `RUN_BYTES` with one thread, else no limit; one row always fits.
    """

    threads: int = 0
    profile: str | None = None
    ops: Mode = "auto"
    run_bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """A graph in memory. ``model``: what would be in its file; ``tensors``: the data of its external initializers by
    name, which ONNX Runtime reads without a copy: they must not change."""

    model: bytes
    tensors: Arrays


class Session:
    """One loaded graph. Several threads may call `run` at once. ``memory``: read in place of the file at ``path``.

    Weights that our operators pack are given back once they are packed, see `lending`. Not those of ``memory``.

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
        self._run_bytes = options.run_bytes or (RUN_BYTES if options.threads == 1 else None)
        library = find(options.ops)
        left = breakeven.left(library, options.ops) if library else ()
        try:
            try:
                self._session, self._kept = self._open(options, library, left, memory)
            except Exception:
                if not left:
                    raise
                # a graph without the function of an operator, which no bundle should be, needs its kernel
                self._session, self._kept = self._open(options, library, (), memory)
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

    def _open(
        self, options: SessionOptions, library: Library | None, left: tuple[str, ...], memory: Memory | None
    ) -> tuple[ort.InferenceSession, tuple[object, ...]]:
        """A session, and what must live as long."""
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
        if library:
            register(library, settings, left)
        lent = None if memory else lend(self.path, library, left)
        if not lent:
            session, values = self._create(settings, memory)
            return session, (memory, values)
        with counted(library, lent.pages) as packed:
            session, values = self._create(settings, lent)
            lent.give_back(packed)
        return session, (lent.pages, values)

    def _create(
        self, settings: ort.SessionOptions, parts: Memory | Lent | None
    ) -> tuple[ort.InferenceSession, dict[str, ort.OrtValue]]:
        """A session, and the tensors that it borrows."""
        tensors = parts.tensors if parts else {}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
        if isinstance(parts, Lent):  # nodes read this memory itself; of the files, only the places are checked
            settings.add_session_config_entry(_FOLDER, str(parts.folder))
            for name, value in values.items():
                settings.add_initializer(name, value)
        elif parts:
            settings.add_external_initializers([*values], [*values.values()])
        session = ort.InferenceSession(
            parts.model if parts else str(self.path),
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(DISABLED_OPTIMIZERS),
        )
        session._model_bytes = None  # ONNX Runtime's class would keep them
        return session, values

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Arrays by input name -> arrays by output name. Raises `BadRequest` for feeds that the graph does not take.

        Other errors of ONNX Runtime get a note with the graph's path. If rows are independent, more than
        `SessionOptions.run_bytes` of them run in parts of nearly equal size.
        """
        rows = _rows(feeds) if self.graph.batch and self._run_bytes else 1
        parts = min(rows, -(-sum(array.nbytes for array in feeds.values()) // (self._run_bytes or 1)))
        if parts < 2:
            return self._run(feeds)
        ends = [rows * part // parts for part in range(parts + 1)]
        answers = [
            self._run({name: array[start:end] for name, array in feeds.items()}) for start, end in pairwise(ends)
        ]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in self.graph.outputs}

    def _run(self, feeds: Arrays) -> dict[str, Array]:
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


def _rows(feeds: Arrays) -> int:
    """The rows that all arrays have; 1 if they differ, which the graph refuses."""
    counts = {len(array) if array.ndim else 1 for array in feeds.values()}
    return counts.pop() if len(counts) == 1 else 1


def _shape(node: ort.NodeArg) -> tuple[int | str, ...]:
    """Dimensions as in a manifest; () if the graph has no rank."""
    return tuple(d if isinstance(d, int) and d > 0 else str(d) for d in node.shape or ())


def versions() -> dict[str, str]:
    return {"onnxruntime": ort.__version__}
