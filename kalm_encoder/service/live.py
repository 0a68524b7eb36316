"""The version that is live, its model loaded and warm; followed when the tag moves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kalm_encoder import PassageEncoder, PassageTable, QueryDecoder, Reranker
from kalm_encoder.errors import InputError
from kalm_encoder.service.batcher import BatchingDecoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the operator decides.

    Attributes:
        uri: of the passage table; its tag `live` is followed.
        storage_options: as Lance takes them.
        model: hub id or directory; None takes what the table records.
        revision: of `model`.
        device: None takes the first GPU, else the CPU.
        dtype: None takes bfloat16 on GPU and float32 on CPU.
        with_encoder: load the encoder too, for candidates that come as texts.
        hot_bytes: memory for repeated passages.
        index_bytes: memory for where each row lies; twice that while a new version is loaded.
        compile: run the decoder through torch.compile.
        filter_columns: columns that requests may filter by.
        max_candidates: of one request.
        refresh_s: seconds between two looks at the tag.
    """

    uri: str
    storage_options: dict[str, str] | None = field(default=None, repr=False)
    model: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    with_encoder: bool = False
    hot_bytes: int = 0
    index_bytes: int = 512 << 20
    compile: bool = False
    filter_columns: frozenset[str] = frozenset()
    max_candidates: int = 1000
    refresh_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the table, ready to be asked."""

    reranker: Reranker
    decoder: BatchingDecoder
    encoder: PassageEncoder | None

    @property
    def table(self) -> PassageTable:
        """The table at this version."""
        return self.reranker.table

    @property
    def model_name(self) -> str:
        """Name of the model; of a directory the last part, as paths are nobody's business."""
        return self.table.spec.model.rstrip("/").rsplit("/", 1)[-1]


class LiveTable:
    """Holds the live version, and takes a new one over without a pause.

    Args:
        settings: the operator's.
        observe: told the pairs of every batch.

    Attributes:
        current: what new requests get; None until `load` is done.
        failed_swaps: how often a new version could not be taken over.
    """

    def __init__(self, settings: Settings, observe: Callable[[int], None] = lambda _: None) -> None:
        self.settings = settings
        self.current: Version | None = None
        self.failed_swaps = 0
        self._observe = observe
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Raises:
            TableError: no such table, or not complete.
            InputError: a filter column that the table lacks.
        """
        names = self._open().dataset.schema.names
        if lacking := sorted(self.settings.filter_columns - set(names)):
            raise InputError(f"{self.settings.uri} has no column {lacking[0]!r} to filter by")

    def load(self) -> None:
        """Open the table, load the model and score once, so that the first request is no slower.

        Raises:
            KalmError: what `Reranker.open` raises.
        """
        self._take_over(self._open())
        threading.Thread(target=self._follow, name="kalm-follow", daemon=True).start()

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._stop.set()
        if self.current is not None:
            self.current.decoder.close()

    @contextmanager
    def lease(self) -> Iterator[Version]:
        """Lend the live version: a request ends on the version, and the model, it began with."""
        with self._lock:
            if (version := self.current) is None:
                raise RuntimeError("not loaded")
            version.decoder.users += 1
        try:
            yield version
        finally:
            with self._lock:
                version.decoder.users -= 1
                current = self.current and self.current.decoder
                retired = version.decoder is not current and not version.decoder.users
            if retired:
                version.decoder.close()

    def _follow(self) -> None:
        """Look at the tag until closed; take a new version over when it is warm."""
        refused: int | None = None
        table: PassageTable | None = None
        while not self._stop.wait(self.settings.refresh_s):
            try:
                table = self._open()
                if self.current and table.version in (self.current.table.version, refused):
                    continue
                self._take_over(table)
            except Exception as error:  # whatever it is, the version at hand is served on
                self.failed_swaps += 1
                if table and isinstance(error, InputError):  # it will not get better
                    refused = table.version
                logger.exception("the live version could not be taken over")

    def _take_over(self, table: PassageTable) -> None:
        """Make a version the live one: load its model where it is another, warm up, switch."""
        began, old = time.monotonic(), self.current
        same = old is not None and old.decoder.fingerprint == table.spec.fingerprint
        decoder = old.decoder if old and same else self._load_decoder(table)
        encoder = old.encoder if old and same else None
        try:
            reranker = Reranker(table, decoder)
            if self.settings.with_encoder and encoder is None:
                encoder = self._load_encoder(table)
            if not same:
                decoder.call(decoder.decoder.warm_up)
            if self.settings.index_bytes:
                table.load_index(self.settings.index_bytes)
            first = table.dataset.to_table(columns=["id"], limit=8)["id"].to_pylist()
            reranker.rerank("warm up", first)
        except BaseException:
            if not same:
                decoder.close()
            raise
        with self._lock:
            self.current = Version(reranker, decoder, encoder)
            unused = old is not None and not same and not old.decoder.users
        if old and unused:
            old.decoder.close()
        logger.info("version %d ready in %.1f s", table.version, time.monotonic() - began)

    def _open(self) -> PassageTable:
        return PassageTable.open(self.settings.uri, storage_options=self.settings.storage_options)

    def _load_decoder(self, table: PassageTable) -> BatchingDecoder:
        settings, (model, revision) = self.settings, self._model(table)
        return BatchingDecoder(
            QueryDecoder.load(
                model,
                revision=revision,
                device=settings.device,
                dtype=settings.dtype,
                hot_bytes=settings.hot_bytes,
                compile=settings.compile,
            ),
            self._observe,
        )

    def _load_encoder(self, table: PassageTable) -> PassageEncoder:
        """Load the encoder of the checkpoint whose decoder was just compared with the table."""
        settings, (model, revision) = self.settings, self._model(table)
        return PassageEncoder.load(
            model,
            revision=revision,
            device=settings.device,
            dtype=settings.dtype,
            max_length=table.spec.max_length,
        )

    def _model(self, table: PassageTable) -> tuple[str, str | None]:
        if self.settings.model is not None:
            return self.settings.model, self.settings.revision
        return table.spec.model, self.settings.revision or table.spec.revision
