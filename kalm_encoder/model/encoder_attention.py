"""Attention of the text encoder over packed passages: each token sees its own passage alone.

There are three ways. On a GPU in 16 bit it is torch's variable-length flash attention. On a GPU
where that does not work, passages of similar length are padded together. On a CPU it is plain
products, passage by passage, and block by block over the tokens in reach in sliding layers.
All take the same arguments, which `attend_blocks` describes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from kalm_encoder.model.batching import Packed
from kalm_encoder.model.onednn import products, usable

logger = logging.getLogger(__name__)

BLOCK_QUERIES = 128
"""Number of queries of a sliding layer that are computed together. A larger block needs fewer
products, but masks more keys: up to BLOCK_QUERIES - 1 for each query."""
LARGEST_FLASH_HEAD = 256
"""Largest head_dim that flash attention takes."""
# torch 2.11 takes several query heads for one key head without being told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Packed, float, int | None], torch.Tensor
]


def choose_attention(weight: torch.Tensor, head_dim: int) -> Attend:
    """Return the fastest way for the device and dtype of a weight.

    A GPU that cannot use flash attention says why in a warning.
    """
    if weight.device.type != "cuda":
        return attend_blocks
    reasons = {
        f"the dtype is {weight.dtype}": weight.element_size() != 2,
        f"a head has {head_dim} dimensions": head_dim > LARGEST_FLASH_HEAD,
        "the GPU is older than Ampere": torch.cuda.get_device_capability(weight.device) < (8, 0),
    }
    if against := [reason for reason, holds in reasons.items() if holds]:
        logger.warning("the encoder runs without flash attention: %s", ", ".join(against))
        return attend_padded
    return attend_flash


def reach(window: int) -> tuple[int, int]:
    """Return how many tokens to the left and to the right a sliding layer of the encoder sees.

    Example: A window of 512 sees 255 tokens to the left and 256 to the right, as in transformers'
    `sliding_window_mask_function(…, is_causal=False)`.
    """
    return (window + 1) // 2 - 1, window // 2


def attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute attention with torch's variable-length flash attention."""
    starts, longest = packed.starts, max(packed.lengths)
    seen = varlen_attn(
        *(query, key, value, starts, starts, longest, longest),
        scale=scale,
        window_size=(-1, -1) if window is None else reach(window),
        **_GROUPED,
    )
    assert isinstance(seen, torch.Tensor)  # it is a pair only with return_aux
    return seen


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute attention on passages padded to a power of two, all of one padded length at once."""
    groups = query.shape[1] // key.shape[1]
    slots, grids = packed.grids
    size = sum(rows * columns for rows, columns, _ in grids)
    spread = [part.new_zeros((size, *part.shape[1:])) for part in (query, key, value)]
    for grid, part in zip(spread, (query, key, value), strict=True):
        grid[slots] = part
    seen = torch.empty_like(spread[0])
    start = 0
    for rows, columns, sizes in grids:
        own = slice(start, start + rows * columns)
        start += rows * columns
        asked, keys, values = (
            part[own].view(rows, columns, *part.shape[1:]).transpose(1, 2) for part in spread
        )
        mask = _padded_mask(columns, sizes, window)
        found = scaled_dot_product_attention(
            asked,
            keys.repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
            attn_mask=mask,
            scale=scale,
        )
        seen[own] = found.transpose(1, 2).flatten(0, 1)
    return seen[slots]


def _padded_mask(columns: int, sizes: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return what each query sees, (rows, 1, 1 or columns, columns) bool."""
    places = torch.arange(columns, device=sizes.device)
    real = (places < sizes[:, None])[:, None, None, :]
    if window is None:
        return real
    left, right = reach(window)
    distance = places[:, None] - places
    # A padded query would see nothing, which is NaN and slow on some kernels: it sees itself.
    return (real & (distance <= left) & (-distance <= right)) | (distance == 0)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute attention as plain matrix products, passage by passage.

    The query heads of one key head are laid out as if they were positions, so that keys and values
    are never repeated and the products are large.

    Args:
        query: (T, heads, head_dim).
        key: (T, kv heads, head_dim).
        value: (T, kv heads, head_dim).
        packed: Where the passages lie.
        scale: Factor of the products.
        window: Window of a sliding layer. None shows the whole passage to each token.

    Returns:
        (T, heads, head_dim).
    """
    kv_heads = key.shape[1]
    # Each head's rows lie together: oneDNN multiplies rows with gaps 1,000 times more slowly.
    key, value = (part.transpose(0, 1).contiguous() for part in (key, value))
    query = query.view(len(query), kv_heads, -1, query.shape[2]) * scale
    query = query.transpose(0, 1).contiguous()
    seen = torch.empty_like(query)  # (kv heads, T, query heads of each, head_dim)
    at_once = 1 if usable(key) else kv_heads
    start = 0
    for length in packed.lengths:
        for first, last, begin, end in _blocks(length, window):
            rows = slice(start + first, start + last)
            columns = slice(start + begin, start + end)
            for head in range(0, kv_heads, at_once):
                heads = slice(head, head + at_once)
                asked = query[heads, rows].flatten(1, 2)
                scores = products(asked, key[heads, columns])
                bias = _bias(last - first, end - begin, first - begin, window, scores.dtype)
                if bias is not None:
                    by_query = scores.view(len(scores), last - first, -1, end - begin)
                    by_query.add_(bias.to(scores.device))
                weights = torch.softmax(scores, dim=2, dtype=torch.float32).type_as(value)
                found = products(weights, value[heads, columns].transpose(1, 2))
                seen[heads, rows] = found.view_as(seen[heads, rows])
        start += length
    return seen.transpose(0, 1).flatten(1, 2)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Cut the attention of one passage into blocks of queries and the keys in their reach.

    Yields:
        The first and last query and the first and last key; each last is exclusive.
    """
    if window is None or length <= min(reach(window)) + 1:
        yield 0, length, 0, length
        return
    left, right = reach(window)
    for first in range(0, length, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, length)
        yield first, last, max(0, first - left), min(length, last + right)


@lru_cache(maxsize=128)
def _bias(
    queries: int, keys: int, ahead: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what is added to the scores of a block, (queries, 1, keys): 0, or -inf if hidden.

    Args:
        queries: Number of queries.
        keys: Number of keys.
        ahead: Number of keys before the first query.
        window: Window of a sliding layer.
        dtype: Dtype of the scores.

    Returns:
        None if nothing is hidden.
    """
    left, right = (ahead + queries, keys) if window is None else reach(window)
    distance = torch.arange(ahead, ahead + queries)[:, None] - torch.arange(keys)
    hidden = (distance > left) | (-distance > right)
    if not hidden.any():
        return None
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)
