"""A mixture gives every corpus its share, goes through each in epochs, and its order is nobody's but the seed's."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.loading.batches import TrainBatches, validation_batches
from data.loading.order import ROUND, MixtureOrder, samples_per_round
from data.preparation.plan import hash_of
from data.prepare import find, find_by_fingerprint, prepare, problems
from data.settings import DataSettings
from data.sources.files import stdlib_files
from data.sources.records import read_documents
from data.train_tokenizer import train_tokenizer

SEQ_LEN = 32


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 1, 1], [1e9, 1], [1e-9, 1, 1e-9], [5]])
def test_a_round_holds_every_corpus_in_its_share(weights):
    counts = samples_per_round(weights)
    assert counts.sum() == ROUND and counts.min() >= 1
    shares = np.array(weights) / sum(weights) * ROUND
    assert np.abs(counts - shares).max() <= max(1, len(weights) - 1)


def test_every_corpus_goes_through_shuffled_epochs_of_its_own():
    windows = [130, 70]
    mixture = MixtureOrder(windows, [3, 1], seed=0)
    corpora, places = mixture(np.arange(3 * ROUND))
    for start in range(0, 3 * ROUND, ROUND):
        assert Counter(corpora[start : start + ROUND].tolist()) == {0: 750, 1: 250}
    assert len({tuple(corpora[start : start + ROUND].tolist()) for start in range(0, 3 * ROUND, ROUND)}) == 3
    for corpus, count in enumerate(windows):
        # Within a round the samples of a corpus may come in another order than its epochs count them.
        seen = Counter(places[corpora == corpus].tolist())
        assert set(seen) == set(range(count)) and max(seen.values()) - min(seen.values()) <= 1
    assert mixture.windows == max(-(-130 * 4 // 3), 70 * 4)
    some = np.array([5, 999, 1000, 2718])
    assert [x.tolist() for x in mixture(some)] == [corpora[some].tolist(), places[some].tolist()]
    other = MixtureOrder(windows, [3, 1], seed=1)(np.arange(ROUND))
    assert other[0].tolist() != corpora[:ROUND].tolist()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 20_000][:60]
    texts = [document.text for document in read_documents(files, {})]
    for number, text in enumerate(texts):
        file = folder / ("a" if number % 3 else "b") / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    train_tokenizer(texts, folder / "t.model", 400, seed=0)
    return DataSettings(
        name="mixed", source="mixture", tokenizer=str(folder / "t.model"), vocab_size=400, validation_share=0.2,
        mixture=[{"weight": 1, "paths": [str(folder / "a")]}, {"weight": 3, "paths": [str(folder / "b")], "name": "b"}],
        root=str(folder / "prepared"),
    )  # fmt: skip


def test_a_run_draws_from_both_whatever_the_ranks(settings):
    assert find(settings) is None
    prepared = prepare(settings)
    assert find(settings).fingerprint == prepared.fingerprint
    heavier = [{**settings.mixture[0], "weight": 2}, settings.mixture[1]]
    assert prepare(replace(settings, mixture=heavier)).fingerprint != prepared.fingerprint
    names = Counter()
    for step in range(ROUND // 20):
        whole = TrainBatches(prepared.train, SEQ_LEN, 20, 20, seed=0)
        (inputs, targets), *_ = whole.micro_batches(step)
        shared = [
            row.tolist()
            for rank in range(2)
            for batch, _ in TrainBatches(prepared.train, SEQ_LEN, 20, 5, 0, rank, 2).micro_batches(step)
            for row in batch
        ]
        assert shared == inputs.tolist()
        assert (targets[:, :-1] == inputs[:, 1:]).all()
        for place in whole._places(step, 0, 20).tolist():
            names[prepared.train.documents(place, place + 1)[0].partition("/")[0]] += 1
    assert names == {"a": 250, "b": 750}
    alone = [prepare(replace(settings, source="text", mixture=[], **part)) for part in (
        {"paths": settings.mixture[0]["paths"], "name": "mixed-0"}, {"paths": settings.mixture[1]["paths"], "name": "b"}
    )]  # fmt: skip
    scored = sum(int((targets != -100).sum()) for _, targets in validation_batches(prepared.val, SEQ_LEN, 4))
    assert scored == sum(len(one.val) for one in alone) - 1


def test_a_mixture_is_found_again_by_the_fingerprints_of_its_corpora(settings, monkeypatch):
    prepared = prepare(settings)
    manifest = json.loads(next(Path(settings.root).glob("mixed-0-*/manifest.json")).read_text())
    for number in range(20):  # other preparations in the same folder: they are not tried one by one
        other = Path(settings.root, f"other-{number:012x}", "manifest.json")
        other.parent.mkdir()
        other.write_text(json.dumps(manifest | {"fingerprint": f"{number:064x}"}))
    hashes = []
    monkeypatch.setattr("data.prepare.hash_of", lambda *parts: hashes.append(parts) or hash_of(*parts))
    of_run = json.loads(json.dumps(prepared.manifest["mixture"]))  # as a checkpoint has it
    found = find_by_fingerprint(settings, prepared.fingerprint, of_run)
    assert found.fingerprint == prepared.fingerprint and found.manifest == prepared.manifest and len(hashes) <= 3
    assert (found.train[0:500] == prepared.train[0:500]).all()
    heavier = replace(settings, mixture=[{**settings.mixture[0], "weight": 2}, settings.mixture[1]])
    for different, mixture in ((settings, of_run[::-1]), (settings, of_run[:1]), (settings, None), (heavier, of_run)):
        assert find_by_fingerprint(different, prepared.fingerprint, mixture) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": []}, "data.mixture: must be set with data.source=mixture"),
        ({"mixture": [{"weight": 1, "paths": ["a"]}]}, "needs at least two corpora"),
        ({"mixture": [{"paths": ["a"]}, {"weight": -1}]}, "data.mixture[0]: needs a weight above 0"),
        ({"mixture": [1, 2]}, "data.mixture[0]: needs a weight above 0"),
        (
            {"mixture": [{"weight": 1, "seed": 3}, {"weight": 1}]},
            "data.mixture[0]: seed cannot be set for one corpus",
        ),
        ({"mixture": [{"weight": 1, "source": "instructions"}, {"weight": 1}]}, "source instructions cannot be mixed"),
        ({"mixture": [{"weight": 1, "paths": ["/no/such"]}, {"weight": 1, "source": "stdlib"}]}, "/no/such"),
        ({"tokenizer": None}, "data.tokenizer: a mixture needs a tokenizer"),
    ],
)
def test_what_cannot_be_mixed_is_said(settings, changes, message):
    found = problems(replace(settings, **changes))
    assert message in "\n".join(found)
    with pytest.raises(ValueError, match="data"):
        prepare(replace(settings, **changes))
