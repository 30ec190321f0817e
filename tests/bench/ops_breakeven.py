"""The ratios of `calmclip ops build`: each operator beside its local function.

    python -m tests.bench.ops_breakeven [--without avx512,vnni,vbmi]

ONNX Runtime keeps all instruction sets of the processor. So a ratio with masked sets is a lower bound of that of a
processor without them.
"""

from calmclip.models.ops import breakeven, trial
from calmclip.models.ops.spec import Op
from tests.bench.ops import library, options

OPS: tuple[Op, ...] = ()  # the other benches measure the operators


def main() -> None:
    options(__doc__, 0, "the same").parse_args()
    built = library()
    print(breakeven.processor(built))
    for name, ratio in trial.measure(built).items():
        print(f"{name:24s} {built.isas[breakeven.KERNELS[name]]:8s} {ratio:6.2f}")


if __name__ == "__main__":
    main()
