"""`kalm serve`: rerank over HTTP."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jobs import options


def serve(
    uri: options.Table,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8080,
    model: options.TableModel = None,
    revision: options.TableRevision = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    with_encoder: Annotated[
        bool,
        typer.Option("--with-encoder", help="Load the encoder too, for texts that are not stored."),
    ] = False,
    match_text: Annotated[
        bool,
        typer.Option(
            "--match-text",
            help="Score texts from stored states if the table holds them, for clients that send "
            "texts. It needs the index.",
        ),
    ] = False,
    hot_mb: options.HotMb = 0,
    index_mb: Annotated[
        int,
        typer.Option(
            min=0,
            help="Megabytes for an index of all rows, 37 bytes per row and 4 more with "
            "--match-text; 0 holds none.",
        ),
    ] = 512,
    disk_cache: options.DiskCacheFolder = None,
    disk_cache_gb: options.DiskCacheGb = None,
    filter_columns: Annotated[
        str | None, typer.Option(help="Columns that filters may name, with commas. Default: none.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file that maps each API key to a predicate, such as \"tenant = 'a'\". Give "
            "it where clients may see only some of the rows.",
        ),
    ] = None,
    tei: Annotated[
        bool, typer.Option("--tei", help="Give /rerank the shape that clients of TEI expect.")
    ] = False,
    threads: Annotated[
        int, typer.Option(help="Requests worked on at once. Raise it when reads are slow.")
    ] = 16,
    max_pending: Annotated[
        int, typer.Option(help="Requests worked on or waiting. Lower it to refuse (429) sooner.")
    ] = 128,
    max_candidates: Annotated[
        int, typer.Option(help="Candidates per request. Raise it when clients send longer lists.")
    ] = 1000,
    max_body_mb: Annotated[
        int, typer.Option(help="Megabytes per request. Raise it when clients send long texts.")
    ] = 8,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds until a 504. Keep it below the limit of your proxy.")
    ] = 60.0,
    refresh_s: Annotated[
        float, typer.Option(help="Seconds between looks at the tag `live`. Raise it to read less.")
    ] = 10.0,
    keep_alive_s: Annotated[
        int, typer.Option(help="Seconds an idle connection stays. Stay above your load balancer's.")
    ] = 75,
    cors_origins: Annotated[
        str | None,
        typer.Option(help="Origins, with commas, whose pages may ask from a browser; * is all."),
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Run replicas on Ray Serve, for several devices.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="With --ray: number of replicas, one per device.")
    ] = 1,
    address: options.Address = None,
    storage_option: options.StorageOptions = None,
) -> None:
    """Rerank over HTTP: Cohere, Jina, vLLM and TEI shapes, candidates by id or text.

    The service follows the tag `live` of the table. If KALM_API_KEY is set in the environment,
    requests need it, or a key of --keys, as their bearer key.
    """
    with options.needs_extra("serve"):
        from kalm_encoder.service.access import read_origins, who_may_ask
        from kalm_encoder.service.app import create_app, listen
        from kalm_encoder.service.live import open_live
        from kalm_encoder.service.settings import Settings

    settings = Settings(
        uri,
        options.parse_storage_options(storage_option),
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        with_encoder=with_encoder,
        match_text=match_text,
        hot_bytes=hot_mb << 20,
        index_bytes=index_mb << 20,
        disk_cache=options.open_disk_cache(disk_cache, disk_cache_gb),
        filter_columns=frozenset(options.split_list(filter_columns or "")),
        max_candidates=max_candidates,
        refresh_s=refresh_s,
        threads=threads,
        max_pending=max_pending,
        timeout_s=timeout_s,
        max_body=max_body_mb << 20,
        **who_may_ask(host, keys),
        cors_origins=read_origins(cors_origins),
        tei=tei,
    )
    open_live(settings)  # a bad table or column fails here, before a model or a cluster is started
    if not on_ray:
        listen(create_app(settings), host, port, keep_alive_s=keep_alive_s)
        return
    with options.needs_extra("serve-ray"):
        import ray

        from kalm_encoder.service import ray_serve
        from pipeline.workers.on_ray.cluster import RayOptions, connect

    with tempfile.TemporaryDirectory() as folder:
        connect(
            RayOptions(address),
            Path(folder),
            packages=("kalm_encoder",),
            env_vars=ray_serve.PROXY_ENVIRONMENT,
        )
    try:
        ray_serve.listen(settings, host, port, replicas=replicas, keep_alive_s=keep_alive_s)
    finally:
        ray.shutdown()
