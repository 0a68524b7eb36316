"""The reranker inside other frameworks, one module per framework.

from kalm_encoder.adapters.cross_encoder import KaLMCrossEncoder
from kalm_encoder.adapters.lancedb import KaLMReranker
from kalm_encoder.adapters.langchain import KaLMCompressor
from kalm_encoder.adapters.llama_index import KaLMNodePostprocessor
"""
