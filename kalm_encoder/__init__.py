"""Encode passages for KaLM-Reranker-V1 once, store their states, and rerank from stored states.

The names below are the public interface, together with those that kalm_encoder.adapters lists. Each
is imported when it is first used, so that a reader of tables does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kalm_encoder.version import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers; tests/encoder/test_imports.py compares them
    from kalm_encoder.errors import KalmError as KalmError
    from kalm_encoder.matryoshka import PassageStates as PassageStates
    from kalm_encoder.model.decoder import QueryDecoder as QueryDecoder
    from kalm_encoder.model.encoder import PassageEncoder as PassageEncoder
    from kalm_encoder.rerank.reranker import Reranker as Reranker
    from kalm_encoder.rerank.results import RerankResult as RerankResult
    from kalm_encoder.table.cache.disk_cache import DiskCache as DiskCache
    from kalm_encoder.table.reader import PassageTable as PassageTable

MODULES = {
    "DiskCache": "table.cache.disk_cache",
    "KalmError": "errors",
    "PassageEncoder": "model.encoder",
    "PassageStates": "matryoshka",
    "PassageTable": "table.reader",
    "QueryDecoder": "model.decoder",
    "RerankResult": "rerank.results",
    "Reranker": "rerank.reranker",
}


def __getattr__(name: str) -> object:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
