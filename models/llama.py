"""LLaMA: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Keyword arguments and parameter names are those of Hugging Face's `LlamaForCausalLM` (without its leading
"model."), and the same weights give the same logits. There are no buffers: the parameters are the complete state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activation_checkpointing import run
from models.attention import BACKENDS, attention, document_layout, log_kernel, resolve_backend
from models.counter_rng import key
from models.kv_cache import KVCache
from models.loss import chunked_cross_entropy, cross_entropy
from models.precision import at_least_fp32
from models.recompute import recomputable, save_as_recipe
from models.rope import rope_tables, rotate, scaling_problems
from models.weights import fill_weight


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, of `size` elements (Zhang & Sennrich, arXiv 1910.07467).

    Computed in float32 (for float64 in float64), with a result in the dtype of x. If the attribute `lean` is true, the
    backward computes this result again instead of keeping it in memory.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.lean = False

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(self._norm, x, self.weight) if self.lean else self._norm(x, self.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions, x (b, t, hidden) → (b, t, hidden). Other inputs are those of `Block`.

    `kv_heads` < `heads` means grouped-query attention (Ainslie et al., arXiv 2305.13245).
    """

    def __init__(self, hidden_size: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = hidden_size // heads
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, backend: str, cache: KVCache | None, layout: Tensor | None
    ) -> Tensor:
        with save_as_recipe(x):
            q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attention(q, k, v, backend=backend, layout=layout)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), x (b, t, hidden) → (b, t, hidden). Shazeer, arXiv 2002.05202.

    If the attribute `lean` is true, the backward computes silu(gate) · up again instead of keeping it in memory.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.lean = False

    def forward(self, x: Tensor) -> Tensor:
        with save_as_recipe(x):
            gate, up = self.gate_proj(x), self.up_proj(x)
        y = recomputable(swiglu, gate, up) if self.lean else swiglu(gate, up)
        with save_as_recipe(y):
            return self.down_proj(y)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element."""
    return F.silu(gate) * up


class Block(nn.Module):
    """One layer: attention and MLP, x (b, t, hidden) → (b, t, hidden). Compiles to one graph that all layers share.

    The inputs `cos` and `sin` are from `rope_tables`; `backend` and `layout` are those of `models.attention.attention`;
    `cache` has the keys and values of earlier tokens, if any. The attribute `checkpointing` is set by
    `models.activation_checkpointing.checkpoint_blocks`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = SelfAttention(hidden_size, heads, kv_heads)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = MLP(hidden_size, intermediate_size)
        self.checkpointing = "none"

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        backend: str,
        cache: KVCache | None = None,
        layout: Tensor | None = None,
    ) -> Tensor:
        return run(self.checkpointing, self._forward, x, cos, sin, backend, cache, layout)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, backend: str, cache: KVCache | None, layout: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, backend, cache, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A LLaMA language model. Construction leaves torch's default weights: call `init_weights` next.

    Arguments that are not listed here are those of Hugging Face's `LlamaConfig`.

    Args:
        num_key_value_heads: None for one per attention head.
        rope_scaling: scales the positions, see `models.rope.scaled`; None for no scaling.
        attention: "auto", "sdpa" or "flash", see `models.attention.resolve_backend`.

    Attributes:
        loss_chunk_tokens: if set, the loss is computed for this number of tokens at a time, so that the logits of all
            tokens never exist at once. None by default.

    Raises:
        ValueError: an impossible size, `rope_scaling` or `attention`. The message names every problem.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        attention: str = "auto",
    ):
        super().__init__()
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        problems = size_problems(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
            num_key_value_heads=kv_heads, max_position_embeddings=max_position_embeddings, rms_norm_eps=rms_norm_eps,
            rope_theta=rope_theta, initializer_range=initializer_range,
        )  # fmt: skip
        problems += scaling_problems(rope_scaling)
        if attention not in BACKENDS:
            problems.append(f"model.attention={attention} is unknown; choose from {', '.join(BACKENDS)}")
        if problems:
            raise ValueError("\n".join(problems))

        self.head_dim, self.kv_heads = hidden_size // num_attention_heads, kv_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range
        self.attention = attention
        self.loss_chunk_tokens: int | None = None

        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            Block(hidden_size, intermediate_size, num_attention_heads, kv_heads, rms_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.norm = RMSNorm(hidden_size, rms_norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Logits (b, t, vocab) of the next token, or with `targets` the loss.

        Args:
            input_ids: (b, t) int64.
            targets: (b, t) int64, the token that follows each position; -100 for positions without a target.
            documents: int32 (documents + 1,): the first token of each document, counted over all rows, and b · t at the
                end. Every row begins a document. A token attends only to its own document. Rotary positions continue
                across documents; this changes nothing, because only differences of positions matter. None: each row is
                one document.
            caches: one per layer, with the keys and values of the tokens before `input_ids`; those of `input_ids` are
                added. Not together with `documents`.

        Returns:
            Logits in the model's dtype. With targets, the cross-entropy in nats summed over the targets, a scalar in
            float32 (float64 for a float64 model).

        Raises:
            ValueError: more tokens in a row, cached ones included, than `max_position_embeddings`; or attention="flash"
                cannot run.
        """
        start = caches[0].tokens if caches else 0
        tokens = start + input_ids.shape[1]
        if tokens > self.max_position_embeddings:
            raise ValueError(
                f"a sequence of {tokens} tokens is longer than model.max_position_embeddings="
                f"{self.max_position_embeddings}; lower train.seq_len or raise model.max_position_embeddings"
            )
        x = self.embed_tokens(input_ids)
        cos, sin = self.rope_tables(input_ids.shape[1], like=x, start=start)
        backend = resolve_backend(self.attention, x.device, x.dtype, self.head_dim, documents is not None)
        layout = None if documents is None else document_layout(documents, backend, *input_ids.shape)
        if caches is None:
            log_kernel(backend, x, self.head_dim, self.kv_heads, layout)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, backend, caches[i] if caches else None, layout)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)
        # The loss is computed here, not by the caller, so that the hooks of a sharded model include it.
        if self.loss_chunk_tokens:
            return chunked_cross_entropy(self.lm_head, x.flatten(0, 1), targets.flatten(), self.loss_chunk_tokens)
        return cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())

    def rope_tables(self, tokens: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """`models.rope.rope_tables` with the head size, theta and scaling of this model."""
        return rope_tables(tokens, self.head_dim, self.rope_theta, like, start, self.rope_scaling)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """LLaMA's initialisation: norm weights are 1, all other weights are drawn from N(0, initializer_range²).

        Each weight depends only on `seed` and its name, not on the device, sharding or other layers. It is drawn in
        float32 on the CPU and rounded to the model's dtype. The `rows` of a GrassLinear stay unchanged; call its
        `reset` next.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("weight"):
                generator = torch.Generator().manual_seed(key(seed, "init", name))
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
                fill_weight(self, name, draw.mul_(self.initializer_range))

    def to_dtype(self, dtype: torch.dtype) -> "Llama":
        """Cast the parameters to `dtype` in place, and return the model.

        Norm weights become at least float32: they are about 1, where bfloat16 has steps of 2⁻⁷.
        """
        for module in self.modules():
            kept = at_least_fp32(dtype) if isinstance(module, RMSNorm) else dtype
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(kept)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> "Llama":
        super()._apply(fn, recurse)
        # to_empty() makes a new parameter for each module that holds the tied one.
        if self.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        return self


def size_problems(**sizes: float) -> list[str]:
    """A message, with the fix, for each impossible size; [] if there is none.

    `sizes` are numeric arguments of `Llama`, at least hidden_size, num_attention_heads and num_key_value_heads.
    """
    problems = [f"model.{name}={value} must be above 0" for name, value in sizes.items() if not value > 0]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = sizes["num_key_value_heads"]
    if heads > 0 and hidden % (2 * heads):
        problems.append(
            f"model.hidden_size={hidden}: rotary positions need heads of one even size; choose a multiple of "
            f"2 · model.num_attention_heads = {2 * heads}"
        )
    if kv_heads > 0 and heads % kv_heads:
        problems.append(
            f"model.num_key_value_heads={kv_heads} must divide model.num_attention_heads={heads}; "
            "choose one of its divisors"
        )
    return problems


def odd_sizes(**sizes: int) -> list[str]:
    """A message for each size that is not a multiple of 8, which makes bfloat16 matmuls slow on a GPU.

    `sizes` are arguments of `Llama`, such as hidden_size and vocab_size.
    """
    return [
        f"model.{name}={value} is not a multiple of 8, which makes its bfloat16 matmuls slow on a GPU; "
        f"use {value + -value % 8}, or better {value + -value % 128}, a multiple of 128"
        for name, value in sizes.items()
        if value % 8
    ]
