"""Samples of a split that is still being prepared are, to the bit, the samples of the finished split."""

from threading import Timer

import numpy as np
import pytest
import torch

from data.loading.batches import TrainBatches, validation_batches
from data.loading.order import ENDLESS, permute
from data.preparation.corpus_writer import CorpusWriter
from data.prepare import prepare
from data.settings import DataSettings
from data.shards.array_file import _opened
from data.streaming.background import BackgroundPreparation

SEQ_LEN, BLOCK, STEPS, VALIDATED = 32, 96, 30, 7 * 32 + 1


def batches(opened, rank=0, size=1, micro=4, masks=False):
    return TrainBatches(opened.train, SEQ_LEN, 24, micro, 5, rank, size, masks, BLOCK)


def rows(loader, step):
    return [torch.cat(parts) for parts in zip(*loader.micro_batches(step), strict=True)]


def validated(opened):
    return [tensor for batch in validation_batches(opened.val, SEQ_LEN, 4, max_sequences=7) for tensor in batch]


def watched(settings, monkeypatch, look):
    """Prepare, and `look` at what there is at every commit and when all is done."""
    commit = CorpusWriter._commit
    monkeypatch.setattr("data.sources.corpus.BATCH_CHARS", 2**12)
    monkeypatch.setattr("data.preparation.corpus_writer.COMMIT_SECONDS", 0)
    monkeypatch.setattr(CorpusWriter, "_commit", lambda writing: (commit(writing), look()))
    prepare(settings)
    look()


@pytest.mark.parametrize("masks", [False, True])
def test_samples_are_those_of_the_finished_preparation_however_far_it_is(settings, monkeypatch, masks):
    beside, seen, early, ahead = BackgroundPreparation(settings, start=False), {}, [], set()

    def look():
        opened = beside.dataset(VALIDATED)
        if opened is None:
            return
        early[:] = early or [batches(opened, masks=masks), opened]
        for loader in (batches(opened, masks=masks), early[0]):  # opened now, and one that grows
            step = max(seen, default=-1) + 1
            while loader.ready(step) and step < 3 * STEPS:
                seen[step], step = [rows(loader, step), loader.targets(step), loader.documents(step)], step + 1
            assert all(torch.equal(a, b) for a, b in zip(validated(opened), validated(early[1]), strict=True))
        if not opened.train.complete:
            ahead.update(seen)
            assert loader.windows == ENDLESS and not loader.ready(10**6) and loader.epoch(step) == 0

    watched(settings, monkeypatch, look)
    held_out = validated(early[1])
    _opened.cache_clear()  # files that are open have no name
    assert all(torch.equal(a, b) for a, b in zip(validated(early[1]), held_out, strict=True))
    finished = batches(beside.dataset(VALIDATED), masks=masks)
    assert 20 < len(ahead) < finished.windows // 24 < len(seen)  # some before the end, and some of the second epoch
    for loader in (finished, early[0]):  # which was opened under another name
        for step, (expected, targets, documents) in seen.items():
            assert all(torch.equal(a, b) for a, b in zip(rows(loader, step), expected, strict=True))
            assert (loader.targets(step), loader.documents(step)) == (targets, documents)
    assert early[0].epoch(finished.windows // 24 + 1) == 1
    assert early[0].digest(9) == finished.digest(9) != finished.digest(99)


def test_the_first_epoch_is_in_blocks_and_the_next_one_a_whole_shuffle(settings):
    prepare(settings)
    opened = BackgroundPreparation(settings, start=False).dataset(VALIDATED)
    loader, tokens = batches(opened), opened.train[:]
    windows, samples = loader.windows, np.arange(2 * loader.windows)
    assert windows % BLOCK and loader.ready(10**6)
    expected = [
        block * BLOCK + permute(np.array([place]), min(BLOCK, windows - block * BLOCK), f"5 block {block}")[0]
        for block, place in map(divmod, range(windows), [BLOCK] * windows)
    ]
    assert sorted(expected) == list(range(windows))
    expected += permute(np.arange(windows), windows, "5 shuffle 1").tolist()
    for step in range(2 * windows // 24):
        inputs, _ = rows(loader, step)
        here = [expected[sample] * SEQ_LEN for sample in samples[step * 24 : (step + 1) * 24]]
        assert torch.equal(inputs, torch.stack([torch.from_numpy(tokens[i : i + SEQ_LEN].astype("i8")) for i in here]))
        shares = [rows(batches(opened, rank, 2, micro=3), step)[0] for rank in range(2)]
        assert torch.equal(torch.cat(shares), inputs)


def test_validation_files_of_their_own_come_first_and_whole(settings, tmp_path, monkeypatch):
    own = tmp_path / "corpus" / "000.txt"
    settings = DataSettings(**{**vars(settings), "validation_paths": [str(own)]})
    beside, found = BackgroundPreparation(settings, start=False), []
    watched(settings, monkeypatch, lambda: found.append(beside.dataset(VALIDATED)))
    finished, (first, *_) = prepare(settings), [opened for opened in found if opened]
    assert found[0] is None and found.index(first) < len(found) // 2
    assert len(first.val) == len(finished.val) and np.array_equal(first.val[:], finished.val[:])


def test_a_folder_that_has_gone_and_not_come_yet_is_waited_for(settings, monkeypatch):
    def look():
        if found := beside.dataset(VALIDATED):
            seen.append(found)

    beside, seen = BackgroundPreparation(settings, start=False), []
    with pytest.raises(KeyboardInterrupt):
        watched(settings, monkeypatch, lambda: (look(), interrupt(seen)))
    (opened, *_) = seen
    wanted = opened.train[0:64]
    away = beside.plan.work_folder.rename(beside.plan.work_folder.with_suffix(".away"))
    _opened.cache_clear()
    Timer(0.3, lambda: away.rename(beside.plan.work_folder)).start()
    assert (opened.train[0:64] == wanted).all()


def interrupt(seen):
    if seen:
        raise KeyboardInterrupt
