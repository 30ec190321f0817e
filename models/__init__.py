"""calmclip, the shared ground: what a bundle is and does. Free of torch and of HTTP.

Public names are these, loaded when first used; everything else may move.
"""

import os
from importlib import import_module
from typing import Any

# ONNX Runtime's wheels keep a file of what is run and send it to their maker unless told otherwise. They look when they
# are imported, which nothing of ours does before this package.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PUBLIC = {
    "open_bundle": "models.runner",
    "Runner": "models.runner",
    "Example": "models.tasks.detect",
    "Suppression": "models.tasks.detect",
    "CalmclipError": "models.errors",
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}; public: {', '.join(_PUBLIC)}")
