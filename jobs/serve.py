"""`kalm serve`: rerank over HTTP."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import StorageOptions, parse_storage_options
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from kalm_encoder.service.app import Limits
    from kalm_encoder.service.live import Settings

KEY = "KALM_API_KEY"


def serve(
    uri: Annotated[str, typer.Argument(help="The table; its tag live is followed.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8080,
    model: Annotated[str | None, typer.Option(help="Default: what the table records.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; default the first GPU.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the decoder.")] = None,
    with_encoder: Annotated[
        bool, typer.Option("--with-encoder", help="Encode candidates that come as texts.")
    ] = False,
    hot_mb: Annotated[int, typer.Option(help="Memory for repeated passages.")] = 0,
    index_mb: Annotated[
        int, typer.Option(min=0, help="Memory for where each row lies; 0: look up on disk.")
    ] = 512,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile, on a GPU CUDA graphs; not with hot-mb."),
    ] = False,
    filter_columns: Annotated[
        str | None, typer.Option(help="Columns that requests may filter by, with commas.")
    ] = None,
    tei: Annotated[bool, typer.Option("--tei", help="/rerank in TEI's shape.")] = False,
    threads: Annotated[int, typer.Option(help="Requests worked on at once.")] = 16,
    max_pending: Annotated[int, typer.Option(help="Requests at once; above it 429.")] = 128,
    max_candidates: Annotated[int, typer.Option(help="Of one request.")] = 1000,
    max_body_mb: Annotated[int, typer.Option(help="Of one request.")] = 8,
    timeout_s: Annotated[float, typer.Option(help="Of one request.")] = 60.0,
    refresh_s: Annotated[float, typer.Option(help="Between looks at the tag live.")] = 10.0,
    on_ray: Annotated[bool, typer.Option("--ray", help="Replicas on Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: one a device.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="With --ray: the cluster; default RAY_ADDRESS, else local.")
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Rerank over HTTP: Cohere, Jina, vLLM and TEI shapes, candidates by id or text.

    KALM_API_KEY in the environment, if set, is the bearer key requests need.
    """
    try:
        from kalm_encoder.service.app import Limits, create_app, listen
        from kalm_encoder.service.engine import Engine
        from kalm_encoder.service.live import LiveTable, Settings
        from kalm_encoder.service.metrics import Metrics
    except ImportError as error:
        raise InputError(
            f"serving needs {error.name}: pip install 'kalm-preencode[serve]'"
        ) from error

    columns = frozenset(filter(None, (filter_columns or "").split(",")))
    metrics = Metrics()
    settings = Settings(
        uri,
        parse_storage_options(storage_option),
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        with_encoder=with_encoder,
        hot_bytes=hot_mb << 20,
        index_bytes=index_mb << 20,
        compile=compile,
        filter_columns=columns,
        max_candidates=max_candidates,
        refresh_s=refresh_s,
    )
    limits = Limits(threads, max_pending, timeout_s, max_body_mb << 20, os.environ.get(KEY) or None)
    live = LiveTable(settings, metrics.batch.observe)
    live.check()
    if on_ray:
        _on_ray(settings, limits, address, host, port, replicas=replicas, tei=tei)
        return
    # The server handles both itself, and raises them again when all is answered.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    listen(create_app(Engine(live), limits, metrics, tei=tei), host, port)


def _on_ray(
    settings: Settings,
    limits: Limits,
    address: str | None,
    host: str,
    port: int,
    *,
    replicas: int,
    tei: bool,
) -> None:
    try:
        import ray

        from kalm_encoder.service import ray_serve
        from pipeline.workers.on_ray.cluster import RayOptions, connect
    except ImportError as error:
        raise InputError(
            f"--ray needs {error.name}: pip install 'kalm-preencode[serve-ray]'"
        ) from error

    with tempfile.TemporaryDirectory() as folder:
        connect(RayOptions(address), Path(folder), packages=("kalm_encoder",))
    try:
        ray_serve.listen(settings, limits, host, port, replicas=replicas, tei=tei)
    finally:
        ray.shutdown()
