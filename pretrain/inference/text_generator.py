"""Continue a text, and return it in pieces as they are generated."""

import time
from collections.abc import Collection, Iterator, Sequence

from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain.inference.sampling import Sampling, new_tokens, rows_without_token


class TextGenerator:
    """Continues texts with ``model``.

    ``tokens`` and ``seconds`` are the number of new tokens and the time of the latest continuation.

    Args:
        end_ids: tokens that end a text, in addition to the tokenizer's eos token.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, end_ids: Collection[int] = ()):
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.seconds = 0, 0.0
        self._end_ids = {tokenizer.eos_id, *end_ids}
        self._never = rows_without_token(tokenizer, model.embed_tokens.num_embeddings, self._end_ids)

    def stream(self, prompt: str, tokens: int, sampling: Sampling, stops: Sequence[str] = ()) -> Iterator[str]:
        """Continue ``prompt`` by up to ``tokens`` tokens; yields pieces of the new text as they are generated.

        The text ends before the first of ``stops``, or at a token that ends texts. Characters at the end that may be
        the beginning of a stop, or part of an incomplete character, are held back until the next tokens decide.
        """
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        before, shown = len(self.tokenizer.decode(ids)), 0
        self.tokens, began, text = 0, time.perf_counter(), ""
        following = new_tokens(self.model, ids, sampling, self._never)
        for _, token in zip(range(tokens), following, strict=False):
            self.tokens, self.seconds = self.tokens + 1, time.perf_counter() - began
            if token in self._end_ids:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)[before:]
            if found := [text.find(stop) for stop in stops if stop in text]:
                text = text[: min(found)]
                break
            if ready := text[shown : len(text) - _undecided(text, stops)]:
                yield ready
                shown += len(ready)
        yield text[shown:]

    @property
    def speed(self) -> str:
        """The length and speed of the latest continuation, such as "200 tokens, 35.1 tokens/s"."""
        unit = "token" if self.tokens == 1 else "tokens"
        return f"{self.tokens} {unit}, {self.tokens / self.seconds:.1f} tokens/s" if self.tokens else "no tokens"


def _undecided(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of ``text`` that may still change, or may begin one of ``stops``."""
    complete = text.rstrip("\ufffd")
    begun = [n for stop in stops for n in range(1, len(stop)) if complete.endswith(stop[:n])]
    return len(text) - len(complete) + max(begun, default=0)
