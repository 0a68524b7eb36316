"""Configurations of the exact KaLM-Reranker architecture in any size."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, T5Gemma2Config

from pipeline.estimate.flops import Dimensions

DEMO = Dimensions(192, 256, 2, 2, 128, 512, 12288, 2)
"""Dimensions of the checkpoint that ships: 2.4M parameters in the embedding, 1.2M in the layers."""


def configuration(dimensions: Dimensions, tokenizer: PreTrainedTokenizerFast) -> T5Gemma2Config:
    """Return the configuration of a checkpoint with these sizes and this tokenizer's specials.

    The layers that look at everything are spread evenly, and the last layer of each run is one: for
    the published models, each sixth layer.
    """
    every = dimensions.layers // dimensions.full_layers
    layer_types = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(dimensions.layers)
    ]
    text = {
        "vocab_size": dimensions.vocabulary,
        "hidden_size": dimensions.hidden,
        "intermediate_size": dimensions.intermediate,
        "num_hidden_layers": dimensions.layers,
        "num_attention_heads": dimensions.heads,
        "num_key_value_heads": dimensions.kv_heads,
        "head_dim": dimensions.head_dim,
        "query_pre_attn_scalar": dimensions.head_dim,
        "sliding_window": dimensions.sliding_window,
        "layer_types": layer_types,
    }
    # Text reranking never sees an image: this is the smallest vision tower that can be built.
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 1,
        "patch_size": 1,
    }
    begin, end, soft = tokenizer.convert_tokens_to_ids(
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    )
    encoder = {
        "text_config": dict(text),
        "vision_config": vision,
        "mm_tokens_per_image": 1,
        "boi_token_index": begin,
        "eoi_token_index": end,
        "image_token_index": soft,
    }
    return T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=soft)
