"""Preparing a large file takes no more memory than preparing a small one."""

import pytest

from benchmarks.preparation import VOCAB_SIZE, prepared, settings_of, texts
from data.train_tokenizer import train_tokenizer


@pytest.mark.slow
def test_ten_times_as_large_a_file_takes_no_more_memory(tmp_path):
    model = tmp_path / "tokenizer.model"
    train_tokenizer(texts(2), model, VOCAB_SIZE, seed=0)
    peaks = []
    for megabytes in (25, 250):
        settings = settings_of(tmp_path / str(megabytes), model, texts(megabytes))
        peaks.append(prepared(settings)[1:])
    (reader, worker), (reader_of_large, worker_of_large) = peaks
    some_pages = 4 * 2**20  # by which runs of the same size differ; the file grew by 225 MB
    assert reader_of_large - reader < some_pages and worker_of_large - worker < some_pages
