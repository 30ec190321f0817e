"""The service as a Ray Serve application: each replica is a complete service behind Ray's proxy. See ray.md.

The only file that imports Ray. `build` runs once, at deployment; each replica creates its app.
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
from calmclip.service.logs import log_lines
from calmclip.service.metrics import Replicas
from calmclip.service.parts import Service, check_replicas
from calmclip.service.settings import Settings, from_environment

POLL_S = 0.05
ROOM = 4  # requests that Ray sends to a replica, per request that the replica admits
REPORTS = "RAY_USAGE_STATS_ENABLED"


class Args(BaseModel):
    """``args`` of the application in ray.yaml. The settings are variables of its ``runtime_env``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Args":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; expected no less than min_replicas")
        return self


class Replica:
    """What Ray calls on a replica, beside requests. Ray sets ``app``."""

    app: FastAPI

    async def check_health(self) -> None:
        """Wait until the bundles are loaded; Ray calls this before the first request, too.

        Ray replaces a replica that fails, so this fails only if a new replica would do better. A database that does not
        answer is no such case.
        """
        parts: Service = self.app.state.service
        while parts.hub.loading or parts.collections.delays_ready:
            await asyncio.sleep(POLL_S)
        if not parts.hub.ready:
            raise RuntimeError(f"the bundles do not load: {parts.hub.failed or 'none was found'}")

    async def families(self) -> tuple[str, list[Any]]:
        """The replica's name and its metrics."""
        parts: Service = self.app.state.service
        return serve.get_replica_context().replica_tag, parts.metrics.families()


def build(args: Args) -> Application:
    """Raises `BadRequest` for wrong settings, also if they do not allow several replicas, or Ray."""
    if REPORTS not in os.environ:
        raise BadRequest(
            f"Ray reports its usage to its developers; start it with --disable-usage-stats, or set {REPORTS} to 0 or 1"
        )
    settings = from_environment()
    check(settings, args.max_replicas)
    settings = settings.model_copy(update={"threads": settings.cores})  # a replica uses the cores that it requests

    def app() -> FastAPI:
        check(settings, serve.get_replica_context().world_size)  # `deployments` in ray.yaml may override ``args``
        _log(settings.log)
        app = create_app(settings)
        app.state.service.metrics.gather = _all_replicas
        return app

    deployment = serve.deployment(
        name="calmclip",
        # The service refuses excess requests itself, with a measured Retry-After. So Ray must pass them on: no deadline
        # runs while a request is in Ray's queue.
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
    check_replicas(settings, replicas)
    if settings.probes_port is not None:
        raise BadRequest(
            f"CALMCLIP_PROBES_PORT is {settings.probes_port}, but a replica has no port of its own; leave it unset"
        )
    if settings.metrics_port is not None:
        raise BadRequest(
            f"CALMCLIP_METRICS_PORT is {settings.metrics_port}, but a replica has no port of its own; leave it unset"
        )


async def _all_replicas() -> Replicas:
    """Metrics of every replica, because a scrape reaches any one of them."""
    return Replicas(dict(await _peers().broadcast("families").results_async()))


@cache
def _peers() -> Any:
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


def _log(kind: str) -> None:
    logger = logging.getLogger("calmclip")
    logger.handlers = [log_lines(kind)]
    logger.propagate = False
    logger.setLevel(logging.INFO)
