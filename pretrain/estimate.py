"""What a run would hold, told before it is started: ``python -m pretrain.estimate [hydra overrides]``.

Takes the configuration that training takes and walks its steps without memory (pretrain.walk). Prints a table, or with
``estimate.format=json`` one JSON object; exits with 2 and one message when the run cannot be, or does not fit.
"""

import json
import sys
from dataclasses import asdict

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from pretrain.cli.errors import clear_errors, only_asks_hydra
from pretrain.config.compose import load, to_config
from pretrain.config.schema import Config
from pretrain.planner.memory import GIB, MIB, Estimate, estimate, needed, require_fit


def print_table(config: Config, found: Estimate, refresh: dict[str, int]) -> None:
    peaks = found.peak_bytes, found.refresh_peak_bytes
    name_of_unit, unit = ("GiB", GIB) if max(peaks) >= GIB else ("MiB", MIB)
    table = Table(name_of_unit, "a step", "a refresh")
    for name, size in found.components.items():
        if size or refresh[name]:
            table.add_row(name.replace("_", " "), f"{size / unit:.2f}", f"{refresh[name] / unit:.2f}")
    table.add_row("peak", *(f"{peak / unit:.2f}" for peak in peaks))
    table.add_row("on the device", *(f"{needed(config, peak) / unit:.2f}" for peak in peaks))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{found.parameters / 1e6:,.0f}M parameters, {found.flops_per_token / 1e9:,.2f} GFLOPs a token")
    if config.estimate.devices > 1:
        regular, refreshed = found.communicated_bytes_per_step, found.communicated_bytes_per_refresh
        console.print(f"{regular / unit:.3f} {name_of_unit} communicated a step, {refreshed / unit:.3f} with a refresh")
    if found.max_micro_batch_size is not None:
        console.print(f"largest micro-batch in {config.estimate.device_memory_gib:g} GiB: {found.max_micro_batch_size}")


def run(config: Config) -> None:
    with Console(stderr=True).status("walking through the steps of the run …"):  # on a terminal alone
        found, refresh = estimate(config)
    if config.estimate.format == "json":
        print(json.dumps(asdict(found)))
    else:
        print_table(config, found, refresh)
    require_fit(config, found, refresh)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def hydra_main(cfg: DictConfig) -> None:
    with clear_errors():
        run(to_config(cfg))


def main() -> None:
    overrides = sys.argv[1:]
    with clear_errors():
        if not only_asks_hydra(overrides):
            load(overrides)
    hydra_main()


if __name__ == "__main__":
    main()
