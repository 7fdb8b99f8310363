"""Keys and values of earlier tokens, so that attention computes only those of new tokens."""

import torch
from torch import Tensor


class KVCache:
    """The cache of one attention layer.

    Args:
        positions: the largest number of tokens; memory for all of them is allocated with the first.

    Attributes:
        tokens: the number of tokens held.
    """

    def __init__(self, positions: int):
        self.positions, self.tokens = positions, 0
        self._keys = self._values = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next tokens' k and v (b, t, kv_heads, head_dim); returns those of all tokens, as views."""
        if not self.tokens:
            self._keys, self._values = (x.new_empty(x.shape[0], self.positions, *x.shape[2:]) for x in (k, v))
        first, self.tokens = self.tokens, self.tokens + k.shape[1]
        self._keys[:, first : self.tokens], self._values[:, first : self.tokens] = k, v
        return self._keys[:, : self.tokens], self._values[:, : self.tokens]
