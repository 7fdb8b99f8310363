"""Speed and peak memory of preparing a corpus, compared with sentencepiece alone on the same cores.

The corpus is the source of the standard library, in files of C4's format. sentencepiece alone encodes the same texts
from memory, with one thread per core.

    python -m benchmarks.preparation --megabytes 20 200
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import sentencepiece

from data.settings import DataSettings
from data.sources.files import stdlib_files
from data.sources.records import read_documents
from data.train_tokenizer import train_tokenizer

VOCAB_SIZE = 4096
CHARS = 2200  # per document, about as in C4


def texts(megabytes: int) -> list[str]:
    """Return documents of real text, ``megabytes`` MB in total. Copies of a text begin with different numbers."""
    whole = "".join(document.text for document in read_documents(stdlib_files(30_000_000), {}))
    copies = -(-megabytes * 10**6 // len(whole))
    parts = [whole[start : start + CHARS] for start in range(0, len(whole), CHARS)]
    return [f"{copy}\n{part}" for copy in range(copies) for part in parts][: megabytes * 10**6 // CHARS]


def write_c4(folder: Path, documents: list[str]) -> None:
    """Write ``documents`` as a training file, and the first 50 documents also as a validation file."""
    folder.mkdir()
    for name, part in (("c4-train.00000-of-00001", documents), ("c4-validation.00000-of-00001", documents[:50])):
        with gzip.open(folder / f"{name}.json.gz", "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": text, "url": "http://a"}) + "\n" for text in part)


def settings_of(folder: Path, model: Path, documents: list[str]) -> DataSettings:
    """Write ``documents`` to files in ``folder``, and return the settings that prepare them."""
    write_c4(folder, documents)
    return DataSettings(
        name="c4", source="c4", paths=[str(folder)], patterns=["*.json.gz"], tokenizer=str(model),
        vocab_size=VOCAB_SIZE, root=f"{folder}-prepared", max_bytes=2**62,
    )  # fmt: skip


def alone(model: Path, documents: list[str]) -> float:
    """Return the seconds that sentencepiece takes to encode the documents on all cores."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = time.perf_counter()
    for first in range(0, len(documents), 2000):
        processor.encode_as_numpy(documents[first : first + 2000], num_threads=os.cpu_count())
    return time.perf_counter() - start


def prepared(settings: DataSettings) -> tuple[float, int, int]:
    """Prepare a corpus in a new process. Return the seconds, its peak bytes, and those of its largest worker."""
    script = (
        "import json, sys, time, resource\n"
        "from data.prepare import prepare, DataSettings\n"
        "start = time.perf_counter()\n"
        "prepare(DataSettings(**json.loads(sys.argv[1])))\n"
        "seconds, status = time.perf_counter() - start, open('/proc/self/status').read()\n"
        "own = int(status.split('VmHWM:')[1].split()[0])  # ru_maxrss may be of the process that started this one\n"
        "print(json.dumps([seconds, own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(vars(settings))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, own, workers = json.loads(result.stdout.splitlines()[-1])
    return seconds, own * 1024, workers * 1024


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.partition("\n")[0])
    p.add_argument("--megabytes", type=int, nargs="+", default=[20, 200], help="sizes of the text (default: 20 200)")
    p.add_argument("--rounds", type=int, default=2, help="repetitions; the fastest counts (default: 2)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        train_tokenizer(texts(5), model, VOCAB_SIZE, seed=0)
        print(
            f"{'text':>8}  {'sentencepiece alone':>19}  {'preparation':>14}  {'share':>5}  peak memory, largest worker"
        )
        for megabytes in args.megabytes:
            documents = texts(megabytes)
            size = sum(len(text.encode()) for text in documents) / 1e6
            settings = settings_of(folder / str(megabytes), model, documents)
            bare, best = [], []
            for round_ in range(args.rounds):
                bare.append(alone(model, documents))
                best.append(prepared(replace(settings, root=f"{settings.root}-{round_}")))
            (seconds, own, worker), fastest = min(best), min(bare)
            print(
                f"{size:5.0f} MB  {size / fastest:14.2f} MB/s  {size / seconds:9.2f} MB/s  {fastest / seconds:5.2f}"
                f"  {own / 2**20:.0f} MiB, {worker / 2**20:.0f} MiB"
            )


if __name__ == "__main__":
    main()
