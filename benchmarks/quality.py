"""How well Grass learns beside dense training: ``python -m benchmarks.quality [--jobs 2] [stage …]``.

Runs what quality.yaml lists, as ``benchmarks.ablation`` does for its own study: records in ``docs/quality.jsonl``, the
page ``docs/quality.md`` and its picture made of them. What is on record is not run again, an unfinished run is resumed.
The texts come from ``python -m benchmarks.corpora``, which has to be run first. The defaults of Grass were chosen on
the manuals, and nothing was chosen on the C sources.
"""

from benchmarks.ablation import main

if __name__ == "__main__":
    main("quality", __doc__)
