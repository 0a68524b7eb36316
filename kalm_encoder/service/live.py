"""The version that the tag `live` names, with its model loaded and warm; it follows the tag.

A request holds the `Version` it began with, and with it the model. When the last request lets go of
an old version, Python frees it, and the thread of its decoder ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kalm_encoder import PassageEncoder, PassageTable, QueryDecoder, Reranker
from kalm_encoder.errors import InputError
from kalm_encoder.service.batcher import BatchingDecoder, BatchingEncoder, DeviceThread
from kalm_encoder.service.cpus import limit_threads
from kalm_encoder.service.filters import check_filter
from kalm_encoder.service.settings import Settings

logger = logging.getLogger(__name__)

NUM_WARM_UP_PASSAGES = 8
"""Number of passages scored before a version takes over, so that its first request is no slower."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the table, ready to be asked.

    Attributes:
        settings: What the operator decided.
        reranker: The rows that can be asked for, and the decoder.
        decoder: The queue in front of the decoder.
        encoder: The queue in front of the encoder; None if it is not loaded.
        restricted: The same for the predicate of each key that sees only some rows.
    """

    settings: Settings
    reranker: Reranker
    decoder: BatchingDecoder
    encoder: BatchingEncoder | None
    restricted: Mapping[str, Reranker] = field(default_factory=dict)

    def under(self, where: str | None) -> Version:
        """Return this version as a key with this predicate sees it; None sees all rows."""
        return self if where is None else replace(self, reranker=self.restricted[where])

    @property
    def table(self) -> PassageTable:
        """The table at this version."""
        return self.reranker.table

    @property
    def model_name(self) -> str:
        """Name of the model; of a directory only the last part, as clients may not see paths."""
        return self.table.spec.model.rstrip("/").rsplit("/", 1)[-1]


def open_live(settings: Settings) -> PassageTable:
    """Open the version that the tag `live` names, and refuse settings that cannot work with it.

    Raises:
        TableError: There is no table, or it is not complete.
        InputError: The table lacks a filter column, or cannot apply the predicate of a key, or is
            too large for the index that matching texts needs.
    """
    table = PassageTable.open(settings.uri, storage_options=settings.storage_options)
    if lacking := sorted(settings.filter_columns - set(table.dataset.schema.names)):
        raise InputError(f"{settings.uri} has no column {lacking[0]!r} to filter by")
    for predicate in settings.predicates:
        _checked(predicate, table)
    table.index_size(settings.index_bytes, match_text=settings.match_text)
    return table


def _checked(predicate: str, table: PassageTable) -> str:
    """Return the predicate of a key as Lance gets it.

    Raises:
        InputError: It has another form than the filters that requests may send, or the table cannot
            apply it.
    """
    try:
        where = check_filter(predicate, table.dataset.schema.names)
        table.check_filter(where)
    except InputError as error:
        raise InputError(f"the predicate {predicate!r} of a key is refused: {error}") from error
    return where


class LiveTable:
    """Holds the live version, and replaces it by a new one without a pause.

    Args:
        settings: What the operator decided.
        observe_pairs: Function that is told the number of pairs of every batch that is scored.
        observe_texts: Function that is told the number of texts of every batch that is encoded.

    Attributes:
        current: The version that new requests get. None until `load` is done.
        failed_swaps: Number of times that a new version could not take over.
    """

    def __init__(
        self,
        settings: Settings,
        observe_pairs: Callable[[int], None] = lambda _: None,
        observe_texts: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.current: Version | None = None
        self.failed_swaps = 0
        self._observe_pairs, self._observe_texts = observe_pairs, observe_texts
        self._closed = threading.Event()

    def load(self) -> None:
        """Load the live version and begin to follow the tag.

        Raises:
            KalmError: What `Reranker.open` raises.
        """
        limit_threads()  # before the device thread begins, which takes the number over
        self._take_over(open_live(self.settings))
        threading.Thread(target=self._follow, name="kalm-follow", daemon=True).start()

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._closed.set()
        if self.current is not None:
            self.current.decoder.device.close()

    def _follow(self) -> None:
        """Look at the tag until closed; a new version takes over when it is warm."""
        refused: int | None = None
        table: PassageTable | None = None
        while not self._closed.wait(self.settings.refresh_s):
            try:
                table = open_live(self.settings)
                if self.current and table.version in (self.current.table.version, refused):
                    continue
                self._take_over(table)
            except Exception as error:  # whatever it is, the current version is served on
                self.failed_swaps += 1
                if table and isinstance(error, InputError):  # trying again would change nothing
                    refused = table.version
                logger.exception("the new live version could not take over")

    def _take_over(self, table: PassageTable) -> None:
        """Load the model of a version unless it is the current one, warm up, and switch."""
        began, settings, old = time.monotonic(), self.settings, self.current
        model, revision = settings.model, settings.revision
        if model is None:
            model, revision = table.spec.model, revision or table.spec.revision
        how: dict[str, Any] = {
            "revision": revision,
            "device": settings.device,
            "dtype": settings.dtype,
        }
        spec = table.spec
        if old is not None and old.decoder.files.made(spec.fingerprint, spec.files_hash):
            decoder, encoder = old.decoder, old.encoder
        else:
            loaded = QueryDecoder(model, **how, hot_bytes=settings.hot_bytes)
            decoder, encoder = BatchingDecoder(loaded, self._observe_pairs), None
        # It refuses a model that does not belong to the table, before anything is compiled.
        reranker = Reranker(table, decoder.decoder, score_pairs=decoder.score_pairs)
        if old is None or decoder is not old.decoder:
            decoder.device.call(decoder.decoder.warm_up)
        if settings.with_encoder:
            encoder = self._encoder_for(table, encoder, model, how, decoder.device)
        if settings.index_bytes or settings.match_text:
            table.load_index(settings.index_bytes, match_text=settings.match_text)
        if settings.disk_cache is not None:
            table.use_disk_cache(settings.disk_cache, settings.storage_options)
        first = table.dataset.to_table(columns=["id"], limit=NUM_WARM_UP_PASSAGES)
        reranker.rerank("warm up", first["id"].to_pylist())
        restricted = {
            predicate: reranker.restricted(_checked(predicate, table))
            for predicate in settings.predicates
        }
        self.current = Version(settings, reranker, decoder, encoder, restricted)
        logger.info("version %d ready in %.1f s", table.version, time.monotonic() - began)

    def _encoder_for(
        self,
        table: PassageTable,
        old: BatchingEncoder | None,
        model: str,
        how: dict[str, Any],
        device: DeviceThread,
    ) -> BatchingEncoder:
        """Return the old version's encoder if it makes the states of this table, or a new one."""
        length, ratio = table.spec.max_length, table.spec.ratios[0]
        if old is not None and (old.encoder.max_length, old.ratio) == (length, ratio):
            return old
        loaded = PassageEncoder(model, **how, max_length=length)
        return BatchingEncoder(loaded, ratio, device, self._observe_texts)
