"""What benchmarks/repetition.py makes of models whose losses are known."""

import math

import numpy as np
import pytest
import torch

from benchmarks.repetition import losses, repeated

VOCABULARY, HALF = 50, 8


def copier(ids):
    """Predicts that each token follows the token HALF - 1 places back, as a model that copies would; elsewhere 0."""
    logits = torch.full((*ids.shape, VOCABULARY), -100.0)
    for place in range(ids.shape[1]):
        guess = ids[:, place - HALF + 1] if place >= HALF - 1 else torch.zeros(len(ids), dtype=torch.int64)
        logits[torch.arange(len(ids)), place, guess] = 0
    return logits


def test_every_row_is_a_stretch_of_the_text_twice():
    text = np.arange(100, dtype=np.uint16)
    ids = repeated(text, windows=5, half=HALF)
    assert ids.shape == (5, 2 * HALF) and ids.dtype == torch.int64
    assert torch.equal(ids[:, :HALF], ids[:, HALF:]) and torch.equal(ids[:, 1:HALF], ids[:, : HALF - 1] + 1)
    assert torch.equal(repeated(text[:HALF], windows=2, half=HALF)[0, :HALF], torch.arange(HALF))


def test_a_model_that_copies_reads_the_second_time_without_loss():
    ids = repeated(np.random.default_rng(0).integers(1, VOCABULARY, 200), windows=5, half=HALF)
    first, second = losses(copier, ids)
    assert first == pytest.approx(100, abs=1) and second == 0


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess_in_both():
    ids = repeated(np.arange(40), windows=3, half=HALF)
    blind = losses(lambda ids: torch.zeros(*ids.shape, VOCABULARY), ids)
    assert blind == pytest.approx((math.log(VOCABULARY), math.log(VOCABULARY)))
