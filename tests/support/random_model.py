"""Makes a small checkpoint of the exact KaLM-Reranker architecture, with seeded random weights.

It loads through the same code as the published models and is enough to test and measure everything
but ranking quality: random weights rank at random. For that there is the trained `kalm-demo`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.demo_training.architecture import configuration
from pipeline.estimate.flops import Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY = Dimensions(128, 256, 3, 2, 64, 64, 6144, 1)


def make_checkpoint(
    directory: Path, texts: Iterable[str], *, dimensions: Dimensions = TINY, seed: int = 0
) -> Path:
    """Write config, tokenizer and weights (safetensors, float32) into `directory`.

    Args:
        directory: made if it does not exist; may not hold a checkpoint of other dimensions.
        texts: what the tokenizer is trained on.
        dimensions: of the model.
        seed: of the weights.

    Returns:
        `directory`.
    """
    import torch
    from transformers import T5Gemma2ForConditionalGeneration

    tokenizer = train_tokenizer(texts, min(dimensions.vocabulary, TINY.vocabulary))
    config = configuration(dimensions, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5Gemma2ForConditionalGeneration(config)
        # The default initialisation (0.02, norms at 1) gives margins near 0: wider weights make
        # scores of different passages visibly different.
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") and dimensions == TINY:
                torch.nn.init.normal_(parameter, std=0.15)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-fallback BPE tokenizer that keeps white space, as the published one does.

    `yes`, `no` and all special tokens are one token each.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    from jobs.demo_training.tokenizer import finished

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # BPE without a pre-tokenizer would learn pieces across words: train on words.
    words = (("▁" + word) for text in texts for word in text.split())
    return finished(tokenizer, words, size)
