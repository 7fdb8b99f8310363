"""The command line of commands with settings: overrides ``key=value``, and flags such as --help."""

import io
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from pretrain.config.compose import CONF, compose, load, nearest, options
from pretrain.config.schema import Config, ConfigError, types_of_settings
from pretrain.config.text import as_typed

# Hydra's flags, and their numbers of arguments, without the flags that choose files: conf/ and overrides do that.
FLAGS = {
    "--help": 0, "-h": 0, "--hydra-help": 0, "--version": 0, "--cfg": 1, "-c": 1, "--package": 1, "-p": 1,
    "--resolve": 0, "--info": 1, "-i": 1, "--shell-completion": 0, "-sc": 0,
}  # fmt: skip
MULTIRUN = ("-m", "--multirun")
# Examples of the settings used most, and what they are; their defaults are added from conf/.
USED_MOST = {
    "run.name=try1": "folder of the run in runs/",
    "train.dry_run=true": "print the plan of the run, and write nothing",
    "train.steps=1000": "number of steps",
    "train.tokens_per_step=65536": "batch size over all processes",
    "train.micro_batch_size=4": "sequences per forward of a process; by default its complete share of the batch",
    "train.seq_len=512": "tokens in a sequence",
    "train.dtype=bfloat16": "dtype of weights, activations and gradients",
    "optim.rank=128": "rows (or columns) trained in each linear layer",
    "optim.lr=1e-3": "peak learning rate of embeddings, head and norms",
    "optim.linear_lr=1e-3": "peak learning rate of the linear layers",
    "data.paths=[notes]": "with data=text: files, folders and globs",
    "logger.wandb.mode=disabled": "or online, offline, auto",
}
HELP = """\
{program} [group=option ...] [key=value ...]

{about}

Groups (group=option):
{groups}

Settings used most (key=value):
{settings}
For python -m pretrain.estimate only:
  estimate.device_memory_gib=40  memory of a device: print the largest micro-batch, exit with 2 if the run does not fit
  estimate.devices=8             number of devices, of which one is simulated
  estimate.format=json           print one JSON object instead of a table

A list is written 'key=[a,b]', with quotes because shells change brackets: 'data.paths=[notes,book.txt]'.
--cfg job prints every setting with its value. The files in conf/ and README.md explain the settings.
"""


def config_from(arguments: list[str]) -> Config:
    """The configuration from the overrides in ``arguments``. A flag such as --help is answered and ends the process.

    Raises:
        ConfigError: lists all problems, one line each.
    """
    flags, overrides = split_arguments(arguments)
    if set(MULTIRUN) & set(flags):
        raise ConfigError("-m is for sweeps, but this command takes one configuration; for a sweep, use ./launch.sh -m")
    if flags:
        answer_flags(flags, overrides)
    return load(overrides)


def answer_flags(flags: list[str], overrides: list[str]) -> NoReturn:
    """Print the answer to ``flags``, such as the text of --help, and end the process.

    Args:
        flags: Hydra's flags, each followed by its values, as from ``split_arguments``.
        overrides: ``key=value`` settings, for --cfg, which prints the configuration.

    Raises:
        ConfigError: lists wrong overrides, if the flags include --cfg.
    """
    if {"-h", "--help"} & set(flags):
        print(help_text(), end="")
    else:
        if {"-c", "--cfg"} & {flag.partition("=")[0] for flag in flags}:
            compose(overrides)
        answer = io.StringIO()  # Hydra would report a closed pipe with a traceback
        with redirect_stdout(answer):
            run_hydra([*flags, *as_typed(overrides)], lambda _: None)
        print(answer.getvalue(), end="")
    sys.exit()


def run_hydra(arguments: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Let Hydra parse ``arguments`` and call ``job`` with each resulting configuration. Replaces ``sys.argv``."""
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split ``arguments`` into flags, each followed by its values, and ``key=value`` overrides.

    Raises:
        ConfigError: lists the arguments that are neither flags nor overrides.
    """
    flags, overrides, problems = list[str](), list[str](), list[str]()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if name in MULTIRUN or name in FLAGS:
            flags.append(argument)
            flags += [rest.pop(0) for _ in range(0 if equals else FLAGS.get(name, 0)) if rest]
        elif argument.startswith("-") or not (equals or argument.startswith("~")):
            value = rest.pop(0) if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-") else ""
            problems.append(_not_an_override(argument, value, overrides[-1] if overrides else ""))
        else:
            overrides.append(argument)
    if problems:
        raise ConfigError("\n".join(problems))
    return flags, overrides


def _not_an_override(argument: str, value: str, before: str) -> str:
    """How to write ``argument`` as an override; ``value`` follows it and ``before`` is the override before it."""
    name, _, own_value = argument.lstrip("-").replace("-", "_").partition("=")
    known = list(types_of_settings())
    fits = [key for key in known if name in (key, key.rpartition(".")[2])] or nearest(name, known)
    if fits:
        advice = f"; write {fits[0]}={own_value or value or '…'}"
    elif before and not argument.startswith("-"):
        advice = f"; quote a value with spaces: {shlex.quote(f'{before} {argument}')}"
    else:
        advice = ", such as train.steps=1000; --help lists the most common settings"
    return f"{argument}: settings are given as key=value{advice}"


def help_text() -> str:
    """The text of --help: the docstring of the running program, the config groups and the settings used most."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    choices = [f"  {group:<12}{', '.join(options(group))}" for group in groups]
    return HELP.format(
        program=f"python -m {spec.name}" if spec else sys.argv[0],
        about=(main.__doc__ or "").strip().replace("``", ""),
        groups="\n".join(textwrap.fill(line, 100, subsequent_indent=14 * " ") for line in choices),
        settings="\n".join(_used_most()),
    )


def _used_most() -> Iterator[str]:
    """The settings used most, a line each, with their defaults unless these are null or lists."""
    defaults = compose([])
    for example, about in USED_MOST.items():
        default = OmegaConf.select(defaults, example.partition("=")[0])
        shown = "" if default is None or isinstance(default, ListConfig) else f" (default: {default})"
        yield f"  {shlex.quote(example):<31}{about}{shown.replace('False', 'false')}"
