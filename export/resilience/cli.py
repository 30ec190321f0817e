"""The verb resilience. The module of a verb of it is imported when that verb is used."""

from importlib import import_module

from calmclip.models.cli import parser

# verb -> (function, description)
VERBS: dict[str, tuple[str, str]] = {
    "inject": (
        "calmclip.export.resilience.inject_cli:inject_command",
        "flip bits of weights, biases, scales and zero points in memory, and measure what stays",
    ),
    "calibrate": (
        "calmclip.export.resilience.calibrate_cli:calibrate_command",
        "a bundle with bounds on its activations",
    ),
}


def resilience_command(argv: list[str]) -> int:
    """`calmclip resilience inject|calibrate …`."""
    options = parser("resilience", "What flipped bits do to a bundle, and bounds against them.")
    said = "; ".join(f"{verb}: {text}" for verb, (_, text) in VERBS.items())
    options.add_argument("do", choices=[*VERBS], help=f"{said}. 'calmclip resilience VERB --help' says more")
    module, function = VERBS[options.parse_args(argv[:1]).do][0].split(":")
    return int(getattr(import_module(module), function)(argv[1:]))
