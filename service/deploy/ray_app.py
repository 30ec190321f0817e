"""The service as a Ray Serve application: each replica is the whole of it, behind Ray's proxy. See ray.md.

The only file that imports Ray. `build` runs once, where Ray deploys; the app itself is made in each replica.
"""

import asyncio
import logging
import os
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from calmclip.models.errors import BadRequest
from calmclip.service.app import create_app
from calmclip.service.cli import log_lines
from calmclip.service.metrics import Together
from calmclip.service.parts import Service
from calmclip.service.settings import Settings

POLL_S = 0.05
ROOM = 4  # requests that Ray lets into a replica, for each that the replica will take on
REPORTS = "RAY_USAGE_STATS_ENABLED"
OWNED = "lancedb"  # a store that belongs to one process


class Args(BaseModel):
    """``args`` of the application, in ray.yaml. All else are the settings, as variables of its ``runtime_env``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Args":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; expected no less than min_replicas")
        return self


class Replica:
    """What Ray asks of one, beside requests. ``app`` is Ray's to set."""

    app: FastAPI

    async def check_health(self) -> None:
        """Asked before the first request, too: that waits until the bundles are loaded.

        Who fails this is replaced by another, so it fails only where another would do better: a database that does
        not answer is no reason, though `/readyz` says 503.
        """
        parts: Service = self.app.state.service
        while parts.hub.loading or parts.collections.loading:
            await asyncio.sleep(POLL_S)
        if not parts.hub.ready:
            raise RuntimeError(f"the bundles do not load: {parts.hub.failed or 'there are none'}")

    async def families(self) -> tuple[str, list[Any]]:
        """Its name, and its metrics."""
        parts: Service = self.app.state.service
        return serve.get_replica_context().replica_tag, parts.metrics.families()


def build(args: Args) -> Application:
    """Raises `BadRequest` where the settings do not go together with several replicas, or with Ray."""
    if REPORTS not in os.environ:
        raise BadRequest(
            f"Ray reports its use to those who make it; begin it with --disable-usage-stats, or set {REPORTS} to 0 or 1"
        )
    settings = Settings()
    check(settings, args.max_replicas)
    settings = settings.model_copy(update={"threads": settings.cores})  # what a replica asks for is what it uses

    def app() -> FastAPI:
        check(settings, serve.get_replica_context().world_size)  # `deployments` in ray.yaml may say more than ``args``
        _log(settings.log)
        made = create_app(settings)
        made.state.service.metrics.gather = _together
        return made

    deployment = serve.deployment(
        name="calmclip",
        # The service itself turns away what is too much, with a Retry-After it has measured. Ray must let it: while
        # a request is in a queue of Ray's no deadline runs.
        max_ongoing_requests=ROOM * settings.queue.max_pending,
        max_queued_requests=settings.queue.max_pending,
        backpressure_config=BackpressureConfig(retry_after_s=1.0),
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": settings.batch.max_size,
        },
        ray_actor_options={"num_cpus": settings.cores},
        graceful_shutdown_timeout_s=settings.deadline_ms / 1000 + 10,
    )
    return deployment(serve.ingress(app)(Replica)).bind()


def check(settings: Settings, replicas: int) -> None:
    """Raises `BadRequest`."""
    kind = settings.store_url.partition(":")[0]
    if replicas > 1 and kind == OWNED:
        raise BadRequest(
            f"up to {replicas} replicas cannot share a store of {kind}, which belongs to one process; "
            "set CALMCLIP_STORE to pgvector:postgresql://…, or max_replicas to 1"
        )
    if settings.metrics_port is not None:
        raise BadRequest(
            f"CALMCLIP_METRICS_PORT is {settings.metrics_port}, but a replica has no port of its own; leave it unset"
        )


async def _together() -> Together:
    """Every replica's metrics, for a scrape reaches any one of them."""
    return Together(dict(await _peers().broadcast("families").results_async()))


@cache
def _peers() -> Any:
    own = serve.get_replica_context()
    return serve.get_deployment_handle(own.deployment, own.app_name)


def _log(kind: str) -> None:
    logger = logging.getLogger("calmclip")
    logger.handlers = [log_lines(kind)]
    logger.propagate = False
    logger.setLevel(logging.INFO)
