"""Everything the operator of a service decides, in one value that travels to every replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kalm_encoder import DiskCache


@dataclass(frozen=True)
class Settings:
    """The settings of a service: what it loads, and how much work it takes on.

    Attributes:
        uri: The passage table. The service follows its tag `live`.
        storage_options: Object store options, as Lance takes them.
        model: Hub id or directory of the model. None takes what the table records.
        revision: Hub revision of the model.
        device: Device of the model. None takes the first GPU, else the CPU.
        dtype: Data type of the model. None takes bfloat16 on a GPU and float32 on a CPU.
        with_encoder: Whether the encoder is loaded too, for candidates that come as texts.
        hot_bytes: Memory for passages that are asked for again and again.
        index_bytes: Memory for where each row lies. A new version needs as much again until it has
            taken over.
        match_text: Whether candidates that come as texts are scored from stored states if the table
            holds them. It needs the index of rows.
        disk_cache: Cache of states on the local disk. None keeps none there.
        filter_columns: Columns that a filter of a request may name.
        max_candidates: Number of candidates one request may have.
        refresh_s: Seconds between two looks at the tag `live`.
        threads: Number of requests that are worked on at once. The others wait.
        max_pending: Number of requests that may be worked on or wait. One more is answered 429.
        timeout_s: Seconds after which a request is answered 504.
        max_body: Size of a request body in bytes. A longer one is answered 413.
        keys: Bearer keys, of which everything but /health asks for one, each with the predicate
            that its rows satisfy; None for all rows. Without keys nobody is asked for one.
        only_loopback: Whether a request is answered only if its Host is this machine.
        cors_origins: Origins whose pages may read answers in a browser; * is every origin.
        tei: Whether /rerank has the shape of Text Embeddings Inference.
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
    match_text: bool = False
    disk_cache: DiskCache | None = None
    filter_columns: frozenset[str] = frozenset()
    max_candidates: int = 1000
    refresh_s: float = 10.0
    threads: int = 16
    max_pending: int = 128
    timeout_s: float = 60.0
    max_body: int = 8 << 20
    keys: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    only_loopback: bool = False
    cors_origins: frozenset[str] = frozenset()
    tei: bool = False

    @property
    def predicates(self) -> set[str]:
        """The predicates of the keys that see only some rows."""
        return {predicate for predicate in self.keys.values() if predicate is not None}
