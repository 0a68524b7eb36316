"""Encode passages for KaLM-Reranker-V1 once, store them, and rerank from the stored states."""

from importlib import import_module
from typing import TYPE_CHECKING

from kalm_encoder.version import __version__

if TYPE_CHECKING:
    from kalm_encoder.errors import KalmError
    from kalm_encoder.matryoshka import PassageStates
    from kalm_encoder.model.decoder import QueryDecoder
    from kalm_encoder.model.encoder import PassageEncoder
    from kalm_encoder.rerank.reranker import Reranker, RerankResult
    from kalm_encoder.table.reader import PassageTable

__all__ = [
    "KalmError",
    "PassageEncoder",
    "PassageStates",
    "PassageTable",
    "QueryDecoder",
    "RerankResult",
    "Reranker",
    "__version__",
]
_MODULES = {
    "KalmError": "errors",
    "PassageEncoder": "model.encoder",
    "PassageStates": "matryoshka",
    "PassageTable": "table.reader",
    "QueryDecoder": "model.decoder",
    "RerankResult": "rerank.reranker",
    "Reranker": "rerank.reranker",
}


def __getattr__(name: str) -> object:
    """Import what is asked for and no more: a table reader pays for no torch, and the reverse."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
