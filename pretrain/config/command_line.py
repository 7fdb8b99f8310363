"""The command line of the commands that take settings: overrides ``key=value``, and Hydra's flags such as --help."""

import shlex
import sys
import textwrap

import hydra
from omegaconf import OmegaConf

from pretrain.config.compose import CONF, compose, load, nearest, options
from pretrain.config.schema import Config, ConfigError, types_of_settings
from pretrain.config.text import as_typed

# Hydra's flags, and how many arguments each takes. The others choose files, which conf/ and overrides do here.
FLAGS = {
    "--help": 0, "-h": 0, "--hydra-help": 0, "--version": 0, "--cfg": 1, "-c": 1, "--package": 1, "-p": 1,
    "--resolve": 0, "--info": 1, "-i": 1, "--shell-completion": 0, "-sc": 0,
}  # fmt: skip
MULTIRUN = ("-m", "--multirun")


def config_from(arguments: list[str]) -> Config:
    """The configuration that the overrides among ``arguments`` give.

    Where there is a flag of Hydra's, Hydra answers it and the process ends.

    Raises:
        ConfigError: lists everything that is wrong with them, a line each.
    """
    flags, overrides = split_arguments(arguments)
    if set(MULTIRUN) & set(flags):
        raise ConfigError("-m starts a sweep: use ./launch.sh -m, or python -m pretrain.sweep")
    if not flags:
        return load(overrides)
    if "--cfg" in flags or "-c" in flags:
        compose(overrides)
    run_hydra([*flags, *as_typed(overrides)], lambda _: None)
    sys.exit()


def run_hydra(arguments: list[str], job) -> None:
    """Let Hydra read ``arguments`` and call ``job`` with each configuration that they ask for."""
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags, each followed by its arguments, and overrides.

    Raises:
        ConfigError: lists the arguments that are neither.
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
    """How to write ``argument``, which ``value`` follows, as an override; it may belong to ``before``."""
    name, _, own_value = argument.lstrip("-").replace("-", "_").partition("=")
    known = list(types_of_settings())
    fits = [key for key in known if name in (key, key.rpartition(".")[2])] or nearest(name, known)
    if fits:
        advice = f"; write {fits[0]}={own_value or value or '…'}"
    elif before and not argument.startswith("-"):
        advice = f"; quote a value that has spaces: {shlex.quote(f'{before} {argument}')}"
    else:
        advice = ", such as train.steps=1000; --help lists those that are used most"
    return f"{argument}: settings are given as key=value{advice}"


def _about_program() -> str:
    """The docstring of the program that runs, with which --help begins; the help's template takes $$ for a dollar."""
    return (sys.modules["__main__"].__doc__ or "").strip().replace("``", "").replace("$", "$$")


def _name_of_program() -> str:
    """How the program that runs is started: ``python -m pretrain.train``."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else sys.argv[0]


def _list_groups() -> str:
    """The options of each group in ``conf/`` that a user chooses from, a paragraph for each."""
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    lines = [f"  {group:<12}{', '.join(options(group))}" for group in groups]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=14 * " ") for line in lines)


OmegaConf.register_new_resolver("about_program", _about_program, replace=True)
OmegaConf.register_new_resolver("name_of_program", _name_of_program, replace=True)
OmegaConf.register_new_resolver("list_groups", _list_groups, replace=True)
