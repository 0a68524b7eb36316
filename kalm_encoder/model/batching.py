"""Batches under a token budget: padded ones of similar length, or packed ones."""

from collections.abc import Sequence


def make_batches(
    lengths: Sequence[int], budget: int, *, overhead: int = 0, max_padding: float = 1.0
) -> list[list[int]]:
    """Group items so that rows x (longest row + overhead) stays within the budget.

    Args:
        lengths: size of each item, in tokens or states.
        budget: what one batch may cost, padding included; an item above it goes alone.
        overhead: what each row costs on top of its length (a prompt that every row repeats).
        max_padding: largest share of padding in a batch, overhead counted as content.

    Returns:
        Batches of indices into `lengths`, each index once, longest items first (memory then peaks
        at once, not at the end).

    Example: lengths 3, 9, 8 with budget 18 give [[1, 2], [0]]: 2 x 9 = 18 fits, 3 x 9 does not.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    content = 0  # of the last batch
    for i in order:
        size = lengths[i] + overhead
        if batches:
            cost = (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + overhead)
            if cost <= budget and cost - content - size <= max_padding * cost:
                batches[-1].append(i)
                content += size
                continue
        batches.append([i])
        content = size
    return batches


def make_packed_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group passages that are packed without padding into batches of about the same size.

    Args:
        lengths: tokens of each passage.
        budget: tokens of one batch; a passage above it goes alone.

    Returns:
        Batches of indices into `lengths`, each index once, in order.

    Example: lengths 3, 9, 8, 4 with budget 18 give [[0, 1], [2, 3]], not [[0, 1], [2], [3]] nor
    a full batch and a small one: 24 tokens need two batches, of 12 each.
    """
    aim = sum(lengths) / max(1, -(-sum(lengths) // budget))
    batches: list[list[int]] = []
    size = 0
    for i, length in enumerate(lengths):
        if not batches or size >= aim or size + length > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += length
    return batches
