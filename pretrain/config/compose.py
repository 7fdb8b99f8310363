"""Compose a configuration from conf/ and ``key=value`` overrides."""

import difflib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra import initialize_config_dir
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pretrain.config.schema import (
    BaselineConfig,
    Config,
    ConfigError,
    DataConfig,
    GrassConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    types_of_settings,
)
from pretrain.config.text import QUOTED, FileConfigSource, as_typed, quoted

CONF = Path(__file__).resolve().parents[2] / "conf"
SECTIONS = {name.rpartition(".")[0] for name in types_of_settings()}
DEVICE_WORDS = ("device", "devices", "gpu", "gpus", "cuda")  # keys of other programs that are not settings here
DEVICES = (
    "devices are not a setting, because each process uses a GPU if there is one; start two processes with ./launch.sh "
    "--nproc-per-node 2, or write CUDA_VISIBLE_DEVICES=0 (GPU 0) or CUDA_VISIBLE_DEVICES= (CPU) before the command"
)


def register_schema() -> None:
    """Register with Hydra: the schemas by their names in ``conf/``, ``FileConfigSource``, and the resolver by_width."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="optim", name="optim_schema", node=OptimConfig)
    store.store(group="optim", name="grass_schema", node=GrassConfig)
    store.store(group="optim", name="baseline_schema", node=BaselineConfig)
    store.store(group="data", name="data_schema", node=DataConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)
    SourcesRegistry.instance().register(FileConfigSource)  # Hydra does not replace an existing source
    OmegaConf.register_new_resolver("by_width", _by_width, replace=True)


def _by_width(*given: Any, _root_: DictConfig, _node_: Node) -> float:
    """The resolver ``${by_width:rate,width}``: a peak learning rate that falls as 1 / hidden size.

    µP scales the rates of hidden matrices like this for Adam (Yang et al., arXiv 2203.03466); steps of Muon have the
    size of Adam's here.

    Args:
        given: the rate at hidden size ``width``, and ``width``, as two numbers.

    Raises:
        ConfigError: anything else is given, or ``width`` is not above 0; names the key and the correct form.
    """
    if len(given) != 2 or any(type(value) not in (int, float) for value in given) or given[1] <= 0:
        key = _node_._get_full_key(None)
        raise ConfigError(
            f"{key}={_node_._value()}: by_width needs two numbers, a rate and the hidden size at which it holds; "
            f"write it like '{key}=${{by_width:6.0e-3,128}}'"
        )
    rate, width = given
    return float(f"{rate * width / max(_root_.model.hidden_size, 1):.3g}")  # a size below 1 has an error of its own


register_schema()


def load(overrides: list[str]) -> Config:
    """Compose ``conf/`` with ``overrides``, such as "train.steps=100", as the training command does.

    Checks names and types, but not whether the values are possible; see ``pretrain.setup.checks.check``.

    Raises:
        ConfigError: lists every override that names an unknown key or gives a wrong type, or every missing value.
    """
    with _explained(overrides):
        return to_config(_compose(overrides))


def compose(overrides: list[str]) -> DictConfig:
    """As ``load``, but returns Hydra's DictConfig, in which settings may lack a value.

    Raises:
        ConfigError: lists every override that names an unknown key or gives a wrong type.
    """
    with _explained(overrides):
        return _compose(overrides)


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose("config", overrides=as_typed(overrides))
        except (ValueError, AssertionError) as error:  # for a list without brackets, or an override without a key
            raise HydraException(str(error) or "overrides have the form key=value") from None


def to_config(cfg: DictConfig) -> Config:
    """The configuration from ``compose`` as dataclasses, with interpolations resolved.

    Raises:
        ConfigError: names the keys that have no value, or are not in the schema (``+key`` can add such keys).
    """
    if missing := OmegaConf.missing_keys(cfg):
        raise ConfigError("\n".join(f"{k} has no value; give it as {k}=…" for k in sorted(missing)))
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, Config):
        raise ConfigError("conf/config.yaml does not use the schema; add config_schema to its defaults")
    known = keys(OmegaConf.structured(config))
    if unknown := [k for k in keys(cfg) if k not in known]:
        raise ConfigError("\n".join(f"{k} is not a key of the configuration{_did_you_mean(k, known)}" for k in unknown))
    return config


@contextmanager
def _explained(overrides: list[str]) -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into ConfigErrors."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(overrides, error)) from None


def _explain(overrides: list[str], error: Exception) -> str:
    """One line for each override that is wrong on its own. If only the combination is wrong, the original error."""
    choices = {o: o.lstrip("+~").partition("=")[::2] for o in overrides}
    if added := [o for o, (group, _) in choices.items() if o.startswith("+") and group and (CONF / group).is_dir()]:
        return "\n".join(f"{o}: this group is already in the configuration; remove the +" for o in added)
    groups = [o for o, (group, value) in choices.items() if value in options(group)]
    try:
        known = [*(p.name for p in CONF.iterdir() if p.is_dir()), *keys(_compose(groups))]
    except (HydraException, OmegaConfBaseException):
        return _in_short(error)
    lines = []
    for override, (name, value) in choices.items():
        if (possible := options(name)) and value not in possible:
            lines.append(f"{override}: {name} can be {', '.join(possible)}{_did_you_mean(value, possible)}")
            continue
        if name not in known and name.rpartition(".")[2] in DEVICE_WORDS:
            lines.append(f"{override}: {DEVICES}")
            continue
        try:
            to_config(_compose(list(dict.fromkeys([*groups, override]))))
        except OverrideParseException:
            reason = f"the value cannot be parsed; text needs quotes: {shlex.quote(f'{name}={quoted(value)}')}"
            if name not in known:
                reason = f"{name} is not a key of the configuration{_did_you_mean(name, known)}"
            lines.append(f"{override}: {reason}")
        except (HydraException, OmegaConfBaseException, ConfigError) as own_error:
            reason = _in_short(own_error).removeprefix(f"{override}: ")
            reason = reason.removeprefix(f"{name}={value[1:-1] if QUOTED.fullmatch(value) else value}: ")
            lines.append(f"{override}: {reason}{_did_you_mean(name, known)}")
    return "\n".join(lines) or _in_short(error)


def options(group: str) -> list[str]:
    """The possible values of ``group=…``; [] if ``group`` is not a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []


def _in_short(error: Exception) -> str:
    """The message of Hydra or OmegaConf, without the dump of types after it."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference"))]
    return "; ".join(kept).removeprefix("ConfigError raised while resolving interpolation: ")


def nearest(name: str, known: list[str]) -> list[str]:
    """The name in ``known`` that is most similar to ``name``, as a list; [] if none is similar."""
    return difflib.get_close_matches(name, known, n=1)


def _did_you_mean(name: str, known: list[str]) -> str:
    near = nearest(name, known)
    return f"; did you mean {near[0]}?" if near and name not in known else ""


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    """The dotted names of all settings below ``node``, each after ``prefix``."""
    found: list[str] = []
    for name in map(str, node):
        full = f"{prefix}{name}"
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        found += keys(child, full + ".") if isinstance(child, DictConfig) else [full]
    return found


def read_config(file: Path) -> DictConfig:
    """The content of ``file``, a run's config.yaml.

    Raises:
        ConfigError: the file cannot be read, or contains a list instead of settings.
    """
    try:
        stored = OmegaConf.load(file)
        OmegaConf.to_container(stored, resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError, AttributeError) as error:
        reason = _in_short(error) or type(error).__name__
        raise ConfigError(f"{file} cannot be read ({reason}); restore it from a backup") from None
    if not isinstance(stored, DictConfig):
        raise ConfigError(f"{file} contains a list instead of settings; restore it from a backup")
    return stored


def flat(config: Any) -> dict[str, Any]:
    """The settings of an OmegaConf ``config`` by dotted name, interpolations resolved: ``{"train.steps": 300, …}``.

    A setting whose value is a mapping, such as model.rope_scaling, stays one value.
    """
    flat: dict[str, Any] = {}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and f"{prefix}{key}" in SECTIONS:
                visit(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    visit(cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)), "")
    return flat
