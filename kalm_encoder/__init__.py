"""Encode passages for KaLM-Reranker-V1 once, store them, and rerank from the stored states."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalm_encoder.decoder import QueryDecoder
    from kalm_encoder.encoder import PassageEncoder
    from kalm_encoder.errors import KalmError
    from kalm_encoder.pooling import PassageStates
    from kalm_encoder.rerank import Reranker, RerankResult
    from kalm_encoder.table import PassageTable

__all__ = [
    "KalmError",
    "PassageEncoder",
    "PassageStates",
    "PassageTable",
    "QueryDecoder",
    "RerankResult",
    "Reranker",
]
__version__ = "0.1.0"

_MODULES = {
    "KalmError": "errors",
    "PassageEncoder": "encoder",
    "PassageStates": "pooling",
    "PassageTable": "table",
    "QueryDecoder": "decoder",
    "RerankResult": "rerank",
    "Reranker": "rerank",
}


def __getattr__(name: str) -> object:
    """Import what is asked for and no more: a table reader pays for no torch, and the reverse."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
