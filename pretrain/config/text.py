"""Keeps text settings exactly as typed, even if the text looks like a number or is invalid in Hydra's grammar.

Hydra reads ``run.name=2024_111`` as the number 2024111, and its grammar does not allow ``é``, ``=`` and ``(1)``. The
types in the schema say which settings are text. ``as_typed`` puts quotes around their values on the command line, and
``FileConfigSource`` keeps their values as written in the files of ``conf/``.
"""

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydraFiles
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf

from data.settings import DataSettings
from pretrain.config.schema import ConfigError, GrassConfig, types_of_settings

# Values that Hydra reads unchanged as text, without quotes.
PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z_/][\w/.*?@+-]*", re.ASCII | re.IGNORECASE)
QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # in values without quotes
OPENING, CLOSING = "([{", ")]}"
FUNCTION = re.compile(r"(choice|shuffle|sort|tag|extend_list)\((.*)\)", re.DOTALL)  # of Hydra, with values as arguments
NUMBERS = re.compile(r"(range|interval|glob)\(.*\)", re.DOTALL)
TYPES = types_of_settings() | {"data.mixture": list[DataSettings], "optim": GrassConfig, "experiment": str | None}


def quoted(value: object) -> str:
    """``value`` quoted for Hydra's grammar, so that it is read as text."""
    return QuotedString(str(value), Quote.double).with_quotes()


def as_typed(overrides: list[str], sweep: bool = False) -> list[str]:
    """``overrides`` with quotes around the values of text settings.

    With ``sweep``, a comma separates the values of several runs. Without ``sweep``, it is part of the text.

    Raises:
        ConfigError: a list of text is not in brackets, or a bracket is not closed; shows the correct form.
    """
    typed, problems = list[str](), list[str]()
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            kind = TYPES.get(key.lstrip("+"))
            typed.append(f"{key}={_alternatives(value.strip(), kind, sweep)}" if equals and kind else override)
        except ValueError as error:
            problems.append(f"{override}: {str(error).format(key=key)}")
    if problems:
        raise ConfigError("\n".join(problems))
    return typed


def _alternatives(value: str, kind: Any, sweep: bool) -> str:
    """The values of a sweep, or the single value."""
    if not sweep or NUMBERS.fullmatch(value):
        return _value(value, kind)
    if function := FUNCTION.fullmatch(value):
        name, arguments = function.groups()
        return f"{name}({','.join(_alternatives(argument, kind, sweep) for argument in split(arguments))})"
    return ",".join(_value(part, kind) for part in split(value)) if value else value


def _value(value: str, kind: Any) -> str:
    """``value`` of type ``kind`` for Hydra: text is quoted, everything else stays unchanged."""
    if kind is str or kind == str | None:
        return value if kind is not str and value == "null" else _text(value)
    if get_origin(kind) is list:
        return _list(value, get_args(kind)[0])
    if not is_dataclass(kind) or value == "null" or value.startswith("["):
        return value
    return _mapping(value, kind) if value.startswith("{") and value.endswith("}") else _text(value)  # a group's option


def _text(value: str) -> str:
    if not value or PLAIN.fullmatch(value) or QUOTED.fullmatch(value):
        return value
    return quoted(ESCAPED.sub(r"\1", value))


def _list(value: str, kind: Any) -> str:
    if kind not in (str, DataSettings) or value == "null":
        return value
    if function := FUNCTION.fullmatch(value):
        return f"{function[1]}({','.join(_value(part, kind) for part in split(function[2]))})"
    if value.startswith("[") and value.endswith("]"):
        inner = value[1:-1].strip()
        return f"[{','.join(_value(part, kind) for part in split(inner))}]" if inner else "[]"
    if kind is str and len(split(value)) == 1:
        return f"[{_text(value)}]"
    raise ValueError(
        f"a list is written '{{key}}=[{value}]', and text with a comma '{{key}}=[{quoted(value)}]'"
        if kind is str
        else "a list is written '{key}=[{{…}},{{…}}]'"
    )


def _mapping(value: str, kind: Any) -> str:
    """``{name: value, …}`` with the settings of the section ``kind``."""
    types, pairs = types_of_settings(kind), []
    for pair in split(value[1:-1]):
        name, colon, inner = pair.partition(":")
        known = types.get(name.strip())
        pairs.append(f"{name}{colon}{_value(inner.strip(), known)}" if colon and known else pair)
    return "{" + ",".join(pairs) + "}"


def split(text: str) -> list[str]:
    """Split ``text`` at commas and remove the spaces around them. Commas in brackets and quotes do not split."""
    parts, start, depth, i = list[str](), 0, 0, 0
    balanced = sum(map(text.count, OPENING)) == sum(map(text.count, CLOSING))
    while i < len(text):
        before = text[start:i].rstrip()[-1:]
        if text[i] in "\"'" and before in ("", *OPENING, ",", ":") and (end := _closing_quote(text, i)):
            i = end
            continue
        if text[i] == "\\":
            i += 1
        elif text[i] in OPENING and balanced:
            depth += 1
        elif text[i] in CLOSING and balanced:
            depth = max(0, depth - 1)
        elif text[i] == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    return [*parts, text[start:].strip()]


def _closing_quote(text: str, opening: int) -> int | None:
    """The position after the quoted value that begins at ``opening``; None if it is only an apostrophe."""
    found = QUOTED.match(text, opening)
    return found.end() if found and text[found.end() :].lstrip()[:1] in ("", *CLOSING, ",", ":") else None


class FileConfigSource(HydraFiles):
    """Hydra's reader of YAML files, but the values of text settings stay as written in the files."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        file = Path(self.path, self._normalize_file_name(config_path))
        written = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # every scalar is a string
        package = result.header.get("package") or ".".join(Path(config_path).parent.parts)
        if isinstance(written, dict) and isinstance(result.config, DictConfig):
            _restore_text(result.config, written, "" if package == "_global_" else f"{package}.")
        return result


def _restore_text(node: DictConfig, written: dict[str, Any], prefix: str) -> None:
    """Replace numbers and booleans that YAML made of text by the ``written`` text."""
    for name, text in written.items():
        if name not in node or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        kind, value = TYPES.get(f"{prefix}{name}"), node[name]
        if isinstance(value, DictConfig) and isinstance(text, dict):
            _restore_text(value, text, f"{prefix}{name}.")
        elif kind == list[DataSettings] and isinstance(value, ListConfig):
            for corpus, settings in zip(value, text, strict=True):
                _restore_text(corpus, settings, prefix)
        elif kind == list[str] and value is not None:
            node[name] = text if isinstance(text, list) else [text]
        elif kind in (str, str | None) and value is not None:
            node[name] = text
