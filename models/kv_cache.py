"""A cache of keys and values, so that attention computes them only for new tokens."""

import torch
from torch import Tensor


class KVCache:
    """The cache of one attention layer.

    Args:
        positions: the maximum number of tokens; memory for all of them is allocated with the first token.

    Attributes:
        tokens: the number of tokens in the cache.
    """

    def __init__(self, positions: int):
        self.positions, self.tokens = positions, 0
        self._keys = self._values = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys k and values v (b, t, kv_heads, head_dim) of the next t tokens.

        Returns:
            The keys and values (b, tokens, kv_heads, head_dim) of all tokens so far, as views of the cache.
        """
        if not self.tokens:
            self._keys, self._values = (x.new_empty(x.shape[0], self.positions, *x.shape[2:]) for x in (k, v))
        first, self.tokens = self.tokens, self.tokens + k.shape[1]
        self._keys[:, first : self.tokens], self._values[:, first : self.tokens] = k, v
        return self._keys[:, : self.tokens], self._values[:, : self.tokens]
