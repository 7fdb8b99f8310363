"""LLaMA models in Hugging Face's format: ``config.json`` and safetensors files.

"Our" names of weights are those of ``models.llama.Llama``; Hugging Face's have the prefix "model.", except
``lm_head.weight``. A setting in config.json that ``models.llama`` does not implement is refused, because the weights
would load but give other results.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.llama import Llama
from models.rope import SCALINGS, scaling_problems

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NEEDED = "give a folder with a LLaMA in Hugging Face's format"
MODEL_KEYS = set(inspect.signature(Llama).parameters) - {"attention"}
# The defaults in transformers' LlamaConfig for keys that are missing or null in config.json.
DEFAULTS = {
    "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# The only values that models.llama implements; transformers has two names for one activation.
SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


def read_arguments(folder: Path) -> tuple[dict[str, Any], torch.dtype]:
    """The keyword arguments for ``Llama`` and the dtype of the weights, from ``folder``/config.json.

    Raises:
        ValueError: the file cannot be read, or has settings that ``Llama`` does not implement; one line per problem.
    """
    config = read_config(folder)
    config = {**config, **{key: value for key, value in DEFAULTS.items() if config.get(key) is None}}
    dtype_name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, dtype_name, None)
    problems = [
        f"{key}={config[key]} is not supported; only {values[0]} is"
        for key, values in SUPPORTED.items()
        if key in config and config[key] not in values
    ]
    problems += _head_problems(config)
    config["rope_theta"], config["rope_scaling"], rope_problems = _rope(config)
    problems += rope_problems
    problems += [f"{key} is missing" for key in sorted(MODEL_KEYS - config.keys())]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        problems.append(
            f"dtype={dtype_name} is not a floating-point dtype of torch; set it to that of the weights, e.g. bfloat16"
        )
    if problems:
        raise ValueError("\n".join(f"{folder / CONFIG}: {problem}" for problem in problems))
    assert isinstance(dtype, torch.dtype)
    return {key: config[key] for key in MODEL_KEYS}, dtype


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``folder``/config.json.

    Raises:
        ValueError: the file cannot be read, or is not a JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read ({error}); {NEEDED}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not a JSON object; {NEEDED}")
    return config


def _head_problems(config: dict[str, Any]) -> list[str]:
    """A message if config.json states another head size than ``Llama`` derives from the hidden size."""
    derived = (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1)
    stated = config.get("head_dim") or derived
    return [] if stated == derived else [f"head_dim={stated} is not supported; only {derived} is"]


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None, list[str]]:
    """``rope_theta`` and ``rope_scaling`` for ``Llama``, and a line for each setting that is not implemented.

    transformers 5 writes both into ``rope_parameters``. Earlier versions wrote ``rope_theta`` and ``rope_scaling``. The
    key of the type in ``rope_scaling`` was first ``type`` and later ``rope_type``.
    """
    parameters = config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    stated = config.get("rope_scaling") or parameters
    kind = stated.get("rope_type") or stated.get("type") or "default"
    rotated = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    problems = [f"partial_rotary_factor={rotated} is not supported; only 1 is"] if rotated != 1 else []
    if kind == "default" or (kind == "linear" and stated.get("factor") == 1):
        return theta, None, problems
    if kind not in SCALINGS:
        problems.append(f"rope_scaling of type {kind} is not supported; only {' and '.join(SCALINGS)} are")
        return theta, None, problems
    scaling = {"rope_type": kind, **{name: stated[name] for name in SCALINGS[kind] if name in stated}}
    if kind == "llama3":  # as transformers does
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return theta, scaling, problems + [line.removeprefix("model.") for line in scaling_problems(scaling)]


def model_config(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a ``Llama`` with the keyword ``arguments``, and weights in ``dtype``."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, **{key: arguments[key] for key in MODEL_KEYS & arguments.keys()},
        "num_key_value_heads": arguments.get("num_key_value_heads") or arguments["num_attention_heads"],
        "rope_scaling": arguments.get("rope_scaling"), "attention_dropout": 0.0, "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def weight_files(path: Path) -> list[Path]:
    """The safetensors files in the folder ``path``, or ``path`` itself if it is a file.

    Raises:
        ValueError: there is none, or a file in the index is missing.
    """
    if path.is_file():
        return [path]
    if (path / INDEX).exists():
        try:
            names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path / INDEX} cannot be read ({error!r}); copy it again") from None
        files = sorted(path / name for name in names)
    else:
        files = [path / WEIGHTS]
    if absent := [str(file) for file in files if not file.exists()]:
        fix = "copy the model again, because its index names these files"
        if not (path / INDEX).exists():
            fix = "convert weights in other formats to safetensors with transformers' save_pretrained"
        raise ValueError(f"there is no {', '.join(absent)}; {fix}")
    return files


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in the folder or file ``path``, by our names; reads only the headers of the files.

    Raises:
        ValueError: a file is missing, or is not a safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        with _open(file) as tensors:
            shapes |= {_our_name(name): tuple(tensors.get_slice(name).get_shape()) for name in _weight_names(tensors)}
    return shapes


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) for every weight in the folder or file ``path``, one at a time, in its stored dtype.

    Raises:
        ValueError: a file is missing, or is not a safetensors file.
    """
    for file in weight_files(path):
        with _open(file) as tensors:
            for name in _weight_names(tensors):
                yield _our_name(name), tensors.get_tensor(name)


def hf_name(name: str) -> str:
    """Hugging Face's name of the weight with our name ``name``."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _our_name(name: str) -> str:
    return name.removeprefix("model.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file ({error}); copy it again") from None


def _weight_names(tensors: Any) -> list[str]:
    """All names except rotary frequencies, which old conversions store although they follow from ``rope_theta``."""
    return [name for name in tensors.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
