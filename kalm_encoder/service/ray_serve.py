"""`kalm serve --ray`: replicas of the service on a Ray cluster, behind the proxy of Ray Serve.

This is the only module of the query side that knows Ray. Each replica is what `kalm serve` is: one
process with one device.
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
from kalm_encoder.service.app import create_app
from kalm_encoder.service.settings import Settings

logger = logging.getLogger(__name__)
NAME = "kalm"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
GRACE_S = 5.0
"""Seconds that a stopping replica has beyond the time limit of a request."""
MAX_CPUS_PER_REPLICA = 4
"""Number of CPUs one replica takes at most; one forward hardly gets faster with more."""


PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "kalm_encoder.service.http11:use_http11"
}
"""What the environment of a job must hold for Ray Serve's proxies to speak our HTTP/1.1."""


def listen(settings: Settings, host: str, port: int, *, replicas: int, keep_alive_s: int) -> None:
    """Serve on the connected cluster until SIGTERM or Ctrl-C; answer what was accepted.

    A cluster has one Ray Serve. If it runs already, its host and port stay as they are.

    Raises:
        InputError: The cluster is too small.
        KalmError: No replica could load.
    """
    application = _deployment(settings).options(
        name=NAME,
        num_replicas=replicas,
        ray_actor_options=_resources(replicas, settings.device),
        # Twice the limit of a replica, so that the replica itself answers 429.
        max_ongoing_requests=2 * settings.max_pending,
        max_queued_requests=settings.max_pending,
        graceful_shutdown_timeout_s=settings.timeout_s + GRACE_S,
        max_constructor_retry_count=2,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the handler of Ray would abort here
    http_options = {"host": host, "port": port, "keep_alive_timeout_s": keep_alive_s}
    serve.start(http_options=http_options, logging_config=QUIET)
    try:
        serve.run(application.bind(), name=NAME, logging_config=QUIET)
        logger.info("%d replicas ready at %s:%d", replicas, host, port)
        threading.Event().wait()
    except RuntimeError as error:
        raise KalmError(f"no replica could load; its log says why: {error}") from error
    except KeyboardInterrupt:
        logger.info("stopping; accepted requests are answered first")
    finally:
        with suppress(TimeoutError):  # Ray waits for 60 s at most
            serve.delete(NAME)
        while NAME in serve.status().applications:
            time.sleep(0.1)


def _deployment(settings: Settings) -> Any:
    @serve.deployment
    @serve.ingress(lambda: create_app(settings, names_request=False))
    class Replica:
        """One process with one device."""

        app: FastAPI

        async def check_health(self) -> None:
            """Return once the table is loaded: before that, Ray sends no requests here."""
            while self.app.state.live.current is None:
                await asyncio.sleep(0.1)

    return Replica


def _resources(replicas: int, device: str | None) -> dict[str, Any]:
    """Return what one replica takes: a GPU if the cluster has one, else some CPUs."""
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    needs_gpu = gpus > 0 and device != "cpu"
    if replicas > (room := gpus if needs_gpu else cpus):
        raise InputError(
            f"the cluster has room for {room} replicas, not for {replicas}: lower --replicas"
        )
    cpus_per_replica = 1 if needs_gpu else min(MAX_CPUS_PER_REPLICA, cpus // replicas)
    return {"num_gpus": int(needs_gpu), "num_cpus": cpus_per_replica}
