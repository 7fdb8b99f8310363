"""The sections of the benchmark, in the order in which they run. Importing this module loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A question, answered by ``run(bench, case)`` of ``benchmarks.gpu.<module>`` in a separate process.

    ``seconds`` is the expected time on an H100. The section is skipped if less is left of the budget.
    """

    name: str
    module: str
    seconds: int
    question: str
    case: str = ""


SECTIONS = {
    section.name: section
    for section in (
        Section("machine", "machine", 20, "the machine, its packages, and the speed of copies and a matmul"),
        Section("exactness", "exactness", 60, "are random bits, rounding and powers of two the same as on the CPU"),
        Section("attention", "attention", 60, "which attention kernel torch chooses, and the time of each"),
        Section("decoding", "decoding", 20, "is a token slower when its length occurs for the first time"),
        Section("correctness", "correctness", 150, "do 20 steps on text have the same losses as on the CPU"),
        Section("waits", "waits", 60, "where a step waits for the device"),
        Section("memory_13b_eager", "memory", 70, "does 13B train in 40 GB, as the planner predicts", "13b_40gb"),
        Section("memory_13b_compiled", "memory", 90, "the same with compiled blocks", "13b_40gb compiled"),
        Section("memory_7b_eager", "memory", 60, "does 7B train in 24 GB, as the planner predicts", "7b_24gb"),
        Section("memory_7b_compiled", "memory", 80, "the same with compiled blocks", "7b_24gb compiled"),
        Section("memory_1b_eager", "memory", 50, "does 1B train in 8 GB, as the planner predicts", "1b_8gb"),
        Section("memory_1b_compiled", "memory", 60, "the same with compiled blocks", "1b_8gb compiled"),
        Section("step_times_350m", "step_times", 180, "tokens per second of the methods at 350m", "350m"),
        Section("step_times_1b", "step_times", 180, "tokens per second of AdamW and Grass at 1b", "1b"),
        Section("step_times_1b_5504", "step_times", 90, "the same at 1b with 5504 instead of 5461 features", "1b_5504"),
        Section("step_times_7b", "step_times", 180, "tokens per second of the methods for four blocks of 7b", "7b"),
        Section("checkpoints", "checkpoints", 40, "how long saves block the training, three in a row"),
        Section("products", "products", 60, "narrow and full weight-gradient matmuls; 5461 and 5504 features"),
        Section("kernels", "kernels", 90, "time by kernel in a step, and idle time of the device"),
        Section("determinism", "determinism", 60, "are two runs bit-identical"),
        Section("step_times_1b_others", "step_times", 300, "tokens per second of other optimizers at 1b", "1b_others"),
    )
}


def chosen(only: str = "", skip: str = "") -> list[Section]:
    """Return the sections that ``only`` names (all if it is empty), without those that ``skip`` names.

    Both are comma-separated names. A name that is no section selects all sections that begin with it: step_times
    selects all of its cases.

    Raises:
        ValueError: no section begins with a name.
    """
    wanted, unwanted = _named(only) if only else set(SECTIONS), _named(skip)
    return [section for name, section in SECTIONS.items() if name in wanted - unwanted]


def _named(names: str) -> set[str]:
    found: set[str] = set()
    for name in filter(None, names.split(",")):
        matching = {name} if name in SECTIONS else {known for known in SECTIONS if known.startswith(name)}
        if not matching:
            raise ValueError(f"{name} is no section; choose from {', '.join(SECTIONS)}")
        found |= matching
    return found
