"""`Service`: the parts of one app, and how a request gets at them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from calmclip.service.admission import Admission
    from calmclip.service.classifiers import Classifiers
    from calmclip.service.collections import Collections
    from calmclip.service.connections import Connections
    from calmclip.service.engine import Engine
    from calmclip.service.fetching import Fetcher
    from calmclip.service.hub import Hub
    from calmclip.service.metrics import Metrics
    from calmclip.service.settings import Settings


@dataclass(frozen=True)
class Service:
    """The parts of one app, as `create_app` wired them."""

    settings: "Settings"
    metrics: "Metrics"
    admission: "Admission"
    hub: "Hub"
    engine: "Engine"
    collections: "Collections"
    classifiers: "Classifiers"
    fetcher: "Fetcher"
    connections: "Connections"

    @property
    def failed(self) -> dict[str, str]:
        """What does not open, or why the service is leaving: name -> reason, as `/readyz` says."""
        leaving = {"service": "it is shutting down"} if self.admission.leaving else {}
        return {**self.collections.failed, **self.hub.failed, **leaving}

    @property
    def ready(self) -> bool:
        return self.hub.ready and not self.collections.loading and not self.failed


def service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found
