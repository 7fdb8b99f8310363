"""Divide the trained rows among the layers, so that attention layers train a larger share than other layers."""

from collections.abc import Mapping

TENSOR_CORE = 8  # numbers of rows are multiples of it, so that the matmuls of a GPU in bf16 are aligned


def weighted_shares(
    shares: Mapping[str, float], sizes: Mapping[str, int], weights: Mapping[str, float]
) -> dict[str, float]:
    """Divide the trained elements of all layers again, so that the layers' shares are in proportion to ``weights``.

    A layer whose share would exceed 1 is trained completely. The other layers divide the rest in proportion to their
    weights.

    Args:
        shares: before this division: by layer, the part of its elements to train, 0 < share ≤ 1.
        sizes: by layer, the number of its elements.
        weights: by layer, a number above 0.

    Returns:
        The new shares by layer, with the same total of trained elements.
    """
    left = sum(shares[name] * sizes[name] for name in shares)
    found: dict[str, float] = {}
    open_layers = list(shares)
    while open_layers:
        level = left / sum(weights[name] * sizes[name] for name in open_layers)
        full = [name for name in open_layers if weights[name] * level >= 1]
        if not full:
            return found | {name: weights[name] * level for name in open_layers}
        found |= dict.fromkeys(full, 1.0)
        left -= sum(sizes[name] for name in full)
        open_layers = [name for name in open_layers if name not in found]
    return found


def split_ranks(
    ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]], weights: Mapping[str, float]
) -> dict[str, int]:
    """Divide the trained rows (or columns) again among the layers: ``weighted_shares``, rounded to numbers of rows.

    The total of trained elements stays about the same.

    Args:
        ranks: before this division: by layer, the number of rows to train.
        sizes: by layer, the number of all its rows, and the number of elements of a row.
        weights: by layer, a number above 0.

    Returns:
        The new ranks by layer: 1 … 7, a multiple of 8, or all rows of the layer.
    """
    shares = {name: rank / sizes[name][0] for name, rank in ranks.items()}
    elements = {name: rows * length for name, (rows, length) in sizes.items()}
    found = {}
    for name, share in weighted_shares(shares, elements, weights).items():
        rows = sizes[name][0]
        number = max(1, round(share * rows))
        found[name] = min(rows, round(number / TENSOR_CORE) * TENSOR_CORE) if number >= TENSOR_CORE else number
    return found
