"""Numbers of things in messages."""


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`number` and `noun`, with `ending` if there is more than one or none: "1 file", "1,024 batches"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"
