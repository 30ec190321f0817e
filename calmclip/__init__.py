"""calmclip: INT8 bundles of the CLIP family, and a service for them.

`calmclip.models`, `calmclip.export` and `calmclip.service` are relative links to these folders at the top of the
checkout; an installed wheel has the folders themselves. The public names are those below. Each is imported when it is
first used. All other names may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calmclip.models.errors import CalmclipError
    from calmclip.models.runner import Runner, open_bundle
    from calmclip.models.segmenters import Windows
    from calmclip.models.stored_classifier import ClassifierFolder, read_classifier
    from calmclip.models.suppression import Suppression
    from calmclip.models.tasks.attributes import Attributes
    from calmclip.models.tasks.detect import Example
    from calmclip.service.client import AsyncClient, Client

# name -> its module
_PUBLIC = {
    "AsyncClient": "calmclip.service.client",
    "Attributes": "calmclip.models.tasks.attributes",
    "CalmclipError": "calmclip.models.errors",
    "ClassifierFolder": "calmclip.models.stored_classifier",
    "Client": "calmclip.service.client",
    "Example": "calmclip.models.tasks.detect",
    "Runner": "calmclip.models.runner",
    "Suppression": "calmclip.models.suppression",
    "Windows": "calmclip.models.segmenters",
    "open_bundle": "calmclip.models.runner",
    "read_classifier": "calmclip.models.stored_classifier",
}
__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Attributes",
    "CalmclipError",
    "ClassifierFolder",
    "Client",
    "Example",
    "Runner",
    "Suppression",
    "Windows",
    "__version__",
    "open_bundle",
    "read_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'calmclip' has no attribute {name!r}; public: {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
