"""Makes a small checkpoint of the exact KaLM-Reranker architecture, with seeded random weights.

It loads through the same code as the published models and is enough to show and test everything
but ranking quality: random weights rank at random.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_train.architecture import TINY, Dimensions, configuration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]


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
    """Train a byte-fallback BPE tokenizer in which `yes`, `no` and all specials are one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        special_tokens=SPECIAL_TOKENS + byte_tokens,
        max_token_length=16,
        show_progress=False,
    )
    # BPE without a pre-tokenizer would learn pieces across words: train on words.
    words = (("▁" + word) for text in texts for word in text.split())
    tokenizer.train_from_iterator(words, trainer)
    missing = [a for a in ("yes", "no") if tokenizer.token_to_id(a) is None]
    tokenizer.add_tokens([AddedToken(a, single_word=True, normalized=False) for a in missing])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t.startswith(("<start", "<end", "<im"))],
    )
