"""Draw the final loss against the share of the rows that is trained at a time, for ``benchmarks.ablation``."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks import refuse_to_run
from pretrain.runs.figures import GREY, new_figure, save

STYLES = ("--", ":", "-.")


def points(line: Mapping[float, str], losses: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Return the points of a line: the shares of the rows, ascending, and their losses. Unknown losses are left out.

    Args:
        line: for each share of the rows, the setting.
        losses: for each setting, the loss in nats per token.
    """
    known = sorted((float(share), losses[setting]) for share, setting in line.items() if setting in losses)
    return [share for share, _ in known], [loss for _, loss in known]


def plot_frontier(losses: Mapping[str, float], listing: Mapping[str, Any], file: Path) -> None:
    """Draw the losses of one seed against the share of the rows that is trained at a time.

    Args:
        losses: by setting, in nats per token.
        listing: "title"; "lines": by name, the setting of each share, where 1 is dense training; and "beside": by name,
            the setting of a method that is drawn as a horizontal line.
    """
    with new_figure(height=3.9, grid="y") as figure:
        axis = figure.add_subplot()
        shown: set[float] = set()
        for name, line in listing["lines"].items():
            shares, found = points(line, losses)
            axis.plot(shares, found, "o-", label=name)
            shown |= set(shares)
        beside = [(name, setting) for name, setting in listing["beside"].items() if setting in losses]
        for (name, setting), style in zip(beside, STYLES, strict=False):
            axis.axhline(losses[setting], ls=style, c=GREY, label=name)
        axis.set_xticks(sorted(shown), [str(Fraction(share)) for share in sorted(shown)])
        axis.set_xlabel("share of the rows that is trained at a time")
        axis.set_ylabel("nats per token; less is better")
        axis.set_title(listing["title"])
        figure.legend(loc="outside lower center", ncols=2)
        save(figure, file)


if __name__ == "__main__":
    refuse_to_run("frontier", "ablation")
