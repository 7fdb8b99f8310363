"""Losses of Grass compared with dense training: ``python -m benchmarks.quality [--jobs 2] [stage …]``.

Runs the sweeps that quality.yaml lists, with the code of ``benchmarks.ablation``. Results are added to
``docs/quality.jsonl``, and the page ``docs/quality.md`` and its plot are made from them. Runs on record are not
repeated, and unfinished runs are resumed. Run ``python -m benchmarks.corpora`` first: it downloads the two corpora. The
defaults of Grass were chosen on the corpus docs. No setting was chosen on the corpus c.
"""

from benchmarks.ablation import main

if __name__ == "__main__":
    main("quality", __doc__)
