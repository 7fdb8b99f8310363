"""The order of training does not depend on who loads it; validation scores every token once."""

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
import pytest
import torch

from data.loading.batches import TrainBatches, validation_batches
from data.loading.order import permute
from data.loading.prefetch import Prefetch
from data.shards import array_file
from data.shards.reader import INDEX, Shard, Tokens, token_dtype
from data.shards.writer import ShardWriter

SEQ_LEN = 8


def opened(folder, names: list[str], dtype: np.dtype) -> Tokens:
    return Tokens([Shard(folder, name, dtype) for name in names], dtype)


def split(folder, lengths: list[int], vocab_size: int = 2**17) -> Tokens:
    """Documents `d0`, `d1`, … of the given lengths; the token at place i of the split is i."""
    place = 0
    with ShardWriter(folder, "s", token_dtype(vocab_size)) as shard:
        for number, length in enumerate(lengths):
            shard.add(f"d{number}", np.arange(place, place + length), text_bytes=3 * length)
            place += length
    return opened(folder, ["s"], token_dtype(vocab_size))


@pytest.fixture
def tokens(tmp_path) -> Tokens:
    return split(tmp_path, [5, 40, 1, 700, 60, 199])  # 1005 tokens: 125 windows of 8 and 4 tokens more


def batches(tokens, sequences=24, micro=4, seed=0, rank=0, world=1) -> TrainBatches:
    return TrainBatches(tokens, SEQ_LEN, sequences, micro, seed, rank, world)


def step_of_all_ranks(tokens, step: int, micro: int, world: int) -> torch.Tensor:
    """Inputs and last targets of a step, (sequences, SEQ_LEN + 1), ranks one behind the other."""
    loaders = [batches(tokens, micro=micro, rank=rank, world=world) for rank in range(world)]
    parts = [pair for loader in loaders for pair in loader.micro_batches(step)]
    return torch.cat([torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in parts])


def test_a_step_is_the_same_for_any_number_of_ranks_and_any_micro_batch(tokens):
    for step in (0, 1, 7, 1000):
        reference = step_of_all_ranks(tokens, step, micro=24, world=1)
        assert reference.shape == (24, SEQ_LEN + 1)
        for world in (1, 2, 4):
            for micro in (1, 2, 3, 6):
                assert torch.equal(step_of_all_ranks(tokens, step, micro, world), reference)


def test_micro_batches_are_int64_contiguous_and_targets_are_the_next_tokens(tokens):
    pairs = list(batches(tokens).micro_batches(3))
    assert len(pairs) == 6
    for inputs, targets in pairs:
        for tensor in (inputs, targets):
            assert tensor.shape == (4, SEQ_LEN) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert torch.equal(targets, inputs + 1)  # the token at place i is i
        assert torch.equal(inputs[:, 0] % SEQ_LEN, torch.zeros(4, dtype=torch.int64))


def first_tokens(loader: TrainBatches, steps: range) -> list[int]:
    return [t for step in steps for inputs, _ in loader.micro_batches(step) for t in inputs[:, 0].tolist()]


def test_every_window_comes_once_an_epoch_and_epochs_differ(tokens):
    loader = batches(tokens, sequences=5, micro=5)
    assert loader.windows == 125
    epochs = [first_tokens(loader, range(25 * e, 25 * (e + 1))) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [SEQ_LEN * i for i in range(125)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [loader.epoch(step) for step in (0, 24, 25, 50)] == [0, 0, 1, 2]


def test_epochs_follow_each_other_inside_a_step(tokens):
    loader = batches(tokens)  # 24 sequences a step: 125 windows end inside step 5
    seen = first_tokens(loader, range(250 // 24 + 1))
    assert sorted(seen[:125]) == sorted(seen[125:250]) == [SEQ_LEN * i for i in range(125)]


def test_the_order_is_a_function_of_the_seed(tokens):
    reference = first_tokens(batches(tokens), range(5))
    assert first_tokens(batches(tokens), range(5)) == reference
    assert first_tokens(batches(tokens, seed=1), range(5)) != reference
    assert reference != sorted(reference)


def test_the_documents_of_a_step_are_those_its_tokens_come_from(tokens):
    ends = np.cumsum([5, 40, 1, 700, 60, 199])
    for step in range(6):
        rows = step_of_all_ranks(tokens, step, micro=24, world=1)
        numbers = np.searchsorted(ends, rows.flatten().numpy(), side="right").tolist()
        expected = [f"d{number}" for number in dict.fromkeys(numbers)]
        assert batches(tokens, rank=1, world=2).documents(step) == expected


def test_a_split_without_a_window_is_refused_naming_what_to_change(tmp_path):
    assert batches(split(tmp_path, [9]), sequences=4).windows == 1
    with pytest.raises(ValueError, match=r"data: .* 8 tokens.*train\.seq_len=8"):
        batches(split(tmp_path, [8]), sequences=4)


@pytest.mark.parametrize(("sequences", "micro", "world"), [(24, 5, 1), (24, 24, 2), (0, 1, 1), (6, 2, 2)])
def test_a_step_that_does_not_divide_is_refused(tokens, sequences, micro, world):
    with pytest.raises(ValueError, match=r"train\.tokens_per_step: .*train\.micro_batch_size"):
        batches(tokens, sequences, micro, world=world)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, "key").tolist()) == list(range(size))


def test_permute_treats_all_orders_alike():
    """Each of the 24 orders of 4 windows in 1/24 of the epochs: chi-square of 23 degrees, 99.9% below 49.7."""
    epochs = 4800
    counts: dict[tuple, int] = {}
    for epoch in range(epochs):
        order = tuple(permute(np.arange(4), 4, f"0 shuffle {epoch}").tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_a_billion_windows_take_no_table():
    size, start = 10**9, time.perf_counter()
    out = permute(np.arange(size - 1000, size), size, "key")
    assert time.perf_counter() - start < 0.1
    assert len(set(out.tolist())) == 1000 and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.05  # 5 standard deviations of 1000 uniform draws


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 1005])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_validation_has_every_token_as_a_target_once(tmp_path, length, world, batch_size):
    tokens = split(tmp_path, [length])
    per_rank = [list(validation_batches(tokens, SEQ_LEN, batch_size, rank, world)) for rank in range(world)]
    assert len({len(pairs) for pairs in per_rank}) == 1
    scored = []
    for inputs, targets in (pair for pairs in per_rank for pair in pairs):
        assert inputs.shape == targets.shape == (batch_size, SEQ_LEN)
        assert inputs.dtype == targets.dtype == torch.int64
        real = targets != -100
        assert torch.equal(targets[real], inputs[real] + 1)
        assert not inputs[~real].any()
        scored += targets[real].tolist()
    assert sorted(scored) == list(range(1, length))


def test_a_limited_validation_takes_windows_from_all_over_whatever_the_ranks(tokens):
    def starts(batch_size, world):
        pairs = (validation_batches(tokens, SEQ_LEN, batch_size, r, world, max_sequences=10) for r in range(world))
        rows = [(i, t) for ranks in pairs for inputs, targets in ranks for i, t in zip(inputs, targets, strict=True)]
        return sorted(int(i[0]) for i, t in rows if (t != -100).any())

    reference = starts(batch_size=3, world=1)
    assert len(reference) == 10 and reference[0] < 100 and reference[-1] > 800
    assert starts(4, 2) == starts(16, 4) == reference


def test_more_sequences_than_there_are_is_all_of_them(tokens):
    limited = list(validation_batches(tokens, SEQ_LEN, 4, max_sequences=10**6))
    for a, b in zip(limited, validation_batches(tokens, SEQ_LEN, 4), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4096, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")])
def test_tokens_take_two_bytes_as_long_as_the_vocabulary_fits(tmp_path, vocab_size, dtype):
    ids = np.array([0, 1, vocab_size - 1])
    with ShardWriter(tmp_path, "s", token_dtype(vocab_size)) as shard:
        shard.add("d", ids, text_bytes=3)
    tokens = opened(tmp_path, ["s"], token_dtype(vocab_size))
    assert tokens[0:3].dtype == np.dtype(dtype)
    assert tokens[0:3].tolist() == ids.tolist()


def test_a_split_says_how_long_it_is_and_whose_its_tokens_are(tmp_path):
    tokens = split(tmp_path, [5, 40, 1])
    assert (len(tokens), tokens.document_count, tokens.text_bytes) == (46, 3, 3 * 46)
    for start, stop, expected in [(0, 5, ["d0"]), (4, 6, ["d0", "d1"]), (45, 46, ["d2"]), (0, 46, ["d0", "d1", "d2"])]:
        assert tokens.documents(start, stop) == expected


@pytest.mark.parametrize(("ending", "keep"), [("bin", 1000), ("index.npy", 150), ("names", 3)])
def test_a_file_cut_short_while_it_is_read_is_an_error_with_its_name(tmp_path, ending, keep):
    loader = TrainBatches(split(tmp_path, [5, 40, 1, 700, 60, 199]), SEQ_LEN, 5, 5, seed=0, masks=True)
    ahead = Prefetch(loader.micro_batches)
    ahead(0)
    loader.documents(0)
    os.truncate(tmp_path / f"s.{ending}", keep)
    with pytest.raises(ValueError, match=rf"/s\.{ending} is shorter than it was"):
        for step in range(2, 30):
            ahead(step)
            loader.documents(step)
    ahead.close()


def test_many_shards_are_open_a_few_at_a_time_whoever_reads(tmp_path, monkeypatch):
    """Of 200 shards, 600 files, less than the 40 descriptors that are left; four threads push each other's out."""
    monkeypatch.setattr(array_file, "_opened", lru_cache(8)(array_file._opened.__wrapped__))
    names = [f"train-{number:05d}" for number in range(200)]
    for number, name in enumerate(names):
        with ShardWriter(tmp_path, name, token_dtype(4096)) as shard:
            shard.add(name, np.full(20, number), text_bytes=1)
    usual, there = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 40, usual[1]))
    try:
        tokens = opened(tmp_path, names, token_dtype(4096))
        order = np.random.default_rng(0).permutation(200).tolist() * 5
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(
                lambda n: (tokens[20 * n : 20 * n + 20].tolist(), tokens.documents(20 * n, 20 * n + 5)), order
            )
            assert list(found) == [([n] * 20, [names[n]]) for n in order]
        assert len(os.listdir("/proc/self/fd")) <= there + 9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("masks", [False, True])
def test_loading_is_far_faster_than_any_training_here(tmp_path, masks):
    """The nano model trains at 5,401 tokens a second on two cores (docs/results.md), a fiftieth of 270 thousand."""
    loader = TrainBatches(split(tmp_path, [500] * 2000), 256, 512, 16, seed=0, masks=masks)
    next(loader.micro_batches(0))
    start = time.perf_counter()
    count = sum(inputs.numel() for step in range(4) for inputs, *_ in islice(loader.micro_batches(step), 32))
    assert count == 4 * 512 * 256
    assert count / (time.perf_counter() - start) > 1e6  # tokens a second


def test_a_billion_tokens_are_open_and_their_first_batch_is_there_within_a_second(tmp_path):
    """Four shards of sparse files, with an index of half a million documents."""
    shard_tokens, length = 2**28, 2048
    index = np.zeros(shard_tokens // length, dtype=INDEX)
    index["token"], index["name"] = np.arange(len(index)) * length, np.arange(len(index)) * 8
    names = [f"train-{number:05d}" for number in range(4)]
    for name in names:
        np.save(tmp_path / f"{name}.index.npy", index)
        for ending, size in (("bin", 2 * shard_tokens), ("names", 8 * len(index))):
            with open(tmp_path / f"{name}.{ending}", "wb") as file:
                file.truncate(size)
    for masks in (False, True):
        start = time.perf_counter()
        tokens = opened(tmp_path, names, token_dtype(4096))
        loader = TrainBatches(tokens, 1024, 64, 64, seed=0, masks=masks)
        inputs, *_ = next(loader.micro_batches(0))
        targets = loader.targets(0)
        assert time.perf_counter() - start < 1
        assert len(tokens) == 2**30 and inputs.shape == (64, 1024)
        assert targets == 64 * 1024 if not masks else 63 * 1024 <= targets < 64 * 1024
