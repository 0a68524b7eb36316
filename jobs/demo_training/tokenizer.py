"""The demo checkpoint's tokenizer: lower case, one token per frequent word, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train byte-fallback BPE on words and punctuation; white space is dropped.

    `yes`, `no` and all special tokens are one token each.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    # Decoding sets tokens apart by spaces, so that a query that is cut, decoded and tokenised
    # again stays the same.
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.WordPiece(prefix="##", cleanup=False)]
    )
    return finished(tokenizer, texts, size)


def finished(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer and give it the special tokens, `yes` and `no`.

    Args:
        tokenizer: BPE model with byte fallback, whose normalizer and decoder are set.
        texts: Texts that it is trained on.
        size: Limits the size of the vocabulary.
    """
    trainer = BpeTrainer(
        vocab_size=size - 2,
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{i:02X}>" for i in range(256))],
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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
