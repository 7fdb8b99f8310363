"""Estimate the memory of a run before it starts: ``python -m pretrain.estimate [key=value ...]``.

Takes the settings of a training run, and simulates its steps on fake tensors, which use no memory. Prints a table, or
one JSON object with ``estimate.format=json``. Exits with 2 and one message if the run cannot start or does not fit
``estimate.device_memory_gib``.
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from data.wording import counted
from pretrain.cli.errors import clear_errors
from pretrain.config.command_line import config_from
from pretrain.config.schema import Config

if TYPE_CHECKING:
    from pretrain.planner.memory import Estimate


def print_table(config: Config, found: "Estimate", refresh: dict[str, int]) -> None:
    """Print the estimate for ``config`` as a table, and the numbers of parameters, operations and bytes sent.

    Args:
        found: the estimate.
        refresh: bytes by component at the peak of a step with a refresh, in which Grass chooses new rows.
    """
    from pretrain.planner.memory import GIB, MIB, needed_bytes

    peaks = found.peak_bytes, found.refresh_peak_bytes
    name_of_unit, unit = ("GiB", GIB) if max(peaks) >= GIB else ("MiB", MIB)
    table = Table(name_of_unit, "a step", "a refresh")
    for name, size in found.components.items():
        if size or refresh[name]:
            table.add_row(name.replace("_", " "), f"{size / unit:.2f}", f"{refresh[name] / unit:.2f}")
    table.add_row("peak", *(f"{peak / unit:.2f}" for peak in peaks))
    table.add_row("on the device", *(f"{needed_bytes(config, peak) / unit:.2f}" for peak in peaks))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{found.parameters / 1e6:,.0f}M parameters, {found.flops_per_token / 1e9:,.2f} GFLOPs per token")
    if config.estimate.devices > 1:
        regular, refreshed = found.communicated_bytes_per_step, found.communicated_bytes_per_refresh
        console.print(f"{regular / unit:.3f} {name_of_unit} sent per step, {refreshed / unit:.3f} with a refresh")
    if found.max_micro_batch_size is not None:
        largest = counted(found.max_micro_batch_size, "sequence")
        console.print(f"largest micro-batch that fits in {config.estimate.device_memory_gib:g} GiB: {largest}")


def run(config: Config) -> None:
    """Print the estimate for ``config`` as a table or as JSON (``estimate.format``).

    Raises:
        ConfigError: the run cannot start, or does not fit ``estimate.device_memory_gib``; the latter after printing.
    """
    from pretrain.planner.memory import estimate, require_fit

    with Console(stderr=True).status("simulating the steps of the run …"):  # shown on a terminal only
        found, refresh = estimate(config)
    if config.estimate.format == "json":
        print(json.dumps(asdict(found)))
    else:
        print_table(config, found, refresh)
    require_fit(config, found, refresh)


def main() -> None:
    with clear_errors():
        run(config_from(sys.argv[1:]))


if __name__ == "__main__":
    main()
