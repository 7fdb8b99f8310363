"""The sections of the benchmark, in the order in which they run. Importing this loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One question, answered by ``run(bench, case)`` of ``benchmarks.gpu.<module>`` in a process of its own.

    seconds  it should take on an H100; a section is skipped where the budget leaves less
    """

    name: str
    module: str
    seconds: int
    question: str
    case: str = ""


SECTIONS = {
    section.name: section
    for section in (
        Section("machine", "machine", 20, "which machine and packages, and how fast are copies and products alone"),
        Section("exactness", "exactness", 60, "are random draws, rounding and powers of two those of the CPU"),
        Section("attention", "attention", 60, "which attention kernel torch chooses, and the time of each"),
        Section("decoding", "decoding", 20, "does a generated token cost more when its length is new"),
        Section("correctness", "correctness", 150, "do 20 steps on text lose what they lose on the CPU"),
        Section("waits", "waits", 60, "where a step waits for the device"),
        Section("memory_13b_eager", "memory", 70, "does 13B train in 40 GB, as the planner says", "13b_40gb"),
        Section("memory_13b_compiled", "memory", 90, "the same with compiled blocks", "13b_40gb compiled"),
        Section("memory_7b_eager", "memory", 60, "does 7B train in 24 GB, as the planner says", "7b_24gb"),
        Section("memory_7b_compiled", "memory", 80, "the same with compiled blocks", "7b_24gb compiled"),
        Section("memory_1b_eager", "memory", 50, "does 1B train in 8 GB, as the planner says", "1b_8gb"),
        Section("memory_1b_compiled", "memory", 60, "the same with compiled blocks", "1b_8gb compiled"),
        Section("step_times_350m", "step_times", 180, "tokens per second of the methods at 350m", "350m"),
        Section("step_times_1b", "step_times", 180, "the same at 1b, Grass beside AdamW", "1b"),
        Section("step_times_1b_5504", "step_times", 90, "1b with 5504 instead of 5461 features", "1b_5504"),
        Section("step_times_7b", "step_times", 180, "the same for four blocks of 7b", "7b"),
        Section("checkpoints", "checkpoints", 40, "how long saves block the training, three in a row"),
        Section("products", "products", 60, "narrow weight gradients beside whole ones; 5461 beside 5504 features"),
        Section("kernels", "kernels", 90, "which kernels a step's time goes to, and how long the device idles"),
        Section("determinism", "determinism", 60, "are two runs equal to the bit"),
        Section("step_times_1b_others", "step_times", 300, "1b: the other optimizers beside AdamW", "1b_others"),
    )
}


def chosen(only: str = "", skip: str = "") -> list[Section]:
    """The sections that ``only`` names (all when empty) and ``skip`` does not.

    Both are names divided by commas. A name that is no section's stands for all that begin with it: step_times for each
    of its cases.

    Raises:
        ValueError: a name that no section's name begins with.
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
