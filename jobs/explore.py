"""`kalm explore`: the service with a page to try queries on."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import options


def explore(
    uris: Annotated[
        list[str], typer.Argument(help="A table, and others of the same corpus and model.")
    ],
    host: options.Host = "127.0.0.1",
    port: options.Port = 8080,
    model: options.TableModel = None,
    revision: options.TableRevision = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    note: Annotated[
        str | None, typer.Option(help="What readers of the page must know, such as: old corpus.")
    ] = None,
    storage_option: options.StorageOptions = None,
) -> None:
    """Try queries on a page, with the first stage and the reranking side by side.

    Further tables hold other store dtypes or ratios of the first, as `kalm truncate` makes them;
    one decoder serves all. If KALM_API_KEY is set in the environment, the page asks for that key.
    """
    from kalm_encoder.model.checkpoint import DEMO_NAME, DEMO_NOTE

    with options.needs_extra("serve"):
        from kalm_encoder.service.access import who_may_ask
        from kalm_encoder.service.app import create_app, listen
        from kalm_encoder.service.explore.comparing import Explorer
        from kalm_encoder.service.explore.tables import open_tables
        from kalm_encoder.service.settings import Settings

    storage_options = options.parse_storage_options(storage_option)
    tables = open_tables(uris, storage_options)
    if note is None and next(iter(tables.values())).spec.model == DEMO_NAME:
        note = DEMO_NOTE
    settings = Settings(
        uris[0],
        storage_options,
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        **who_may_ask(host),
    )
    listen(create_app(settings, Explorer(tables, note)), host, port)
