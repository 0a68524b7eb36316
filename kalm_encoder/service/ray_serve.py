"""`kalm serve --ray`: replicas of the service on a Ray cluster, behind Ray Serve's proxy.

The only module here that knows Ray. Each replica is what `kalm serve` is: one device, one engine.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.service.app import Limits, create_app
from kalm_encoder.service.engine import Engine
from kalm_encoder.service.live import LiveTable, Settings
from kalm_encoder.service.metrics import Metrics

logger = logging.getLogger(__name__)
NAME = "kalm"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
GRACE_S = 5.0  # above the time limit of a request


def listen(
    settings: Settings, limits: Limits, host: str, port: int, *, replicas: int, tei: bool
) -> None:
    """Serve on the cluster joined already until SIGTERM or Ctrl-C; answer what was accepted.

    A cluster has one Ray Serve: where it runs already, its host and port stay as they are.

    Raises:
        InputError: the cluster is too small.
        KalmError: no replica could load.
    """
    application = _deployment(settings, limits, tei).options(
        name=NAME,
        num_replicas=replicas,
        ray_actor_options=_resources(replicas, settings.device),
        max_ongoing_requests=2 * limits.max_pending,  # so that it is the service who says 429
        max_queued_requests=limits.max_pending,
        graceful_shutdown_timeout_s=limits.timeout_s + GRACE_S,
        max_constructor_retry_count=2,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would abort here
    serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
    try:
        serve.run(application.bind(), name=NAME, logging_config=QUIET)
        logger.info("%d replicas ready at %s:%d", replicas, host, port)
        threading.Event().wait()
    except RuntimeError as error:
        raise KalmError(f"no replica could load, its log says why: {error}") from error
    except KeyboardInterrupt:
        logger.info("stopping; requests at hand are answered first")
    finally:
        with suppress(TimeoutError):  # it waits for 60 s at most
            serve.delete(NAME)
        while NAME in serve.status().applications:
            time.sleep(0.1)


def _deployment(settings: Settings, limits: Limits, tei: bool) -> Any:
    def build() -> FastAPI:
        metrics = Metrics()
        engine = Engine(LiveTable(settings, metrics.batch.observe))
        app = create_app(engine, limits, metrics, tei=tei)
        app.state.engine = engine
        return app

    @serve.deployment
    @serve.ingress(build)
    class Replica:
        """One process, one device."""

        app: FastAPI

        async def check_health(self) -> None:
            """Return once the table is loaded: before that Ray sends no requests here."""
            while self.app.state.engine.live.current is None:
                await asyncio.sleep(0.1)

    return Replica


def _resources(replicas: int, device: str | None) -> dict[str, Any]:
    """Return what one replica holds: a GPU where there is one, else up to 4 CPUs."""
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    needs_gpu = gpus > 0 and device != "cpu"
    if replicas > (room := gpus if needs_gpu else cpus):
        raise InputError(f"{replicas} replicas, the cluster has room for {room}: lower --replicas")
    return {"num_gpus": int(needs_gpu), "num_cpus": 1 if needs_gpu else min(4, cpus // replicas)}
