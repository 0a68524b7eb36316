"""`kalm explore`: the service with a page to try queries on."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from jobs.options import StorageOptions, parse_storage_options
from jobs.serve import KEY
from kalm_encoder.errors import InputError


def explore(
    uris: Annotated[list[str], typer.Argument(help="A table, and others of its corpus and model.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8080,
    model: Annotated[str | None, typer.Option(help="Default: what the table records.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; default the first GPU.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the decoder.")] = None,
    hot_mb: Annotated[int, typer.Option(help="Memory for repeated passages.")] = 0,
    note: Annotated[
        str | None, typer.Option(help="Shown on the page, such as: random weights.")
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Try queries on a page: first stage and reranked side by side, at any ratio and dtype.

    Further tables are other store dtypes or ratios of the first, as `kalm truncate` makes; one
    decoder serves all. KALM_API_KEY in the environment, if set, is the key the page asks for.
    """
    from kalm_encoder.model.checkpoint import DEMO_NAME, DEMO_NOTE

    try:
        from kalm_encoder.service.app import Limits, create_app, listen
        from kalm_encoder.service.engine import Engine
        from kalm_encoder.service.explore.comparing import Explorer
        from kalm_encoder.service.explore.tables import open_tables
        from kalm_encoder.service.live import LiveTable, Settings
        from kalm_encoder.service.metrics import Metrics
    except ImportError as error:
        raise InputError(
            f"exploring needs {error.name}: pip install 'kalm-preencode[serve]'"
        ) from error

    storage_options = parse_storage_options(storage_option)
    tables = open_tables(uris, storage_options)
    if note is None and next(iter(tables.values())).spec.model == DEMO_NAME:
        note = DEMO_NOTE
    metrics = Metrics()
    settings = Settings(
        uris[0],
        storage_options,
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        hot_bytes=hot_mb << 20,
    )
    engine = Engine(LiveTable(settings, metrics.batch.observe))
    limits = Limits(api_key=os.environ.get(KEY) or None)
    # The server handles both itself, and raises them again when all is answered.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    listen(create_app(engine, limits, metrics, explorer=Explorer(engine, tables, note)), host, port)
