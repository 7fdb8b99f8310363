"""LLaMAs as Hugging Face keeps them: what config.json says of a model, and the weights in safetensors files.

Our names are theirs without the leading "model.". Whatever a config asks for that ``models.llama`` does not do is
refused: weights would load, and mean something else.
"""

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.llama import Llama

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OURS = set(inspect.signature(Llama).parameters) - {"attention"}
# What Hugging Face takes a key to be that an older config.json does not have.
DEFAULTS = {
    "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False,
}  # fmt: skip
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read_arguments(folder: Path) -> tuple[dict[str, Any], torch.dtype]:
    """The keyword arguments for Llama, and the dtype of the weights, that ``folder``/config.json states.

    Raises:
        ValueError: no such file, or one line for everything in it that the model here does not do.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read ({error}); name a Hugging Face LLaMA's folder") from None
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    config = {**DEFAULTS, "rope_theta": rope.get("rope_theta", 10000.0), **config}
    config["head_dim"] = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    wanted = {**ONLY, "head_dim": config.get("hidden_size", 0) // config.get("num_attention_heads", 1)}
    problems = [f"{k}={config[k]}: only {v} is supported" for k, v in wanted.items() if config.get(k, v) != v]
    if (kind := scaling.get("rope_type") or scaling.get("type") or "default") != "default":
        problems.append(f"rope_scaling of type {kind}: not supported, every position would be rotated otherwise")
    problems += [f"{key} is missing" for key in sorted(OURS - config.keys())]
    if problems:
        raise ValueError("\n".join(f"{folder / CONFIG}: {problem}" for problem in problems))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))
    return {key: config[key] for key in OURS}, dtype


def as_config(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a Llama of these keyword arguments."""
    return {
        "architectures": ["LlamaForCausalLM"], **ONLY, **{key: arguments[key] for key in OURS & arguments.keys()},
        "num_key_value_heads": arguments.get("num_key_value_heads") or arguments["num_attention_heads"],
        "rope_scaling": None, "attention_dropout": 0.0, "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a folder, or the one that ``path`` is.

    Raises:
        ValueError: there is none, or one that the index names is missing.
    """
    if path.is_file():
        return [path]
    if (path / INDEX).exists():
        files = sorted({path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()})
    else:
        files = [path / WEIGHTS]
    if absent := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"there is no {', '.join(absent)}; weights are read from safetensors files alone")
    return files


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by our name, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files_of(path):
        with _opened(file) as tensors:
            shapes |= {_ours(name): tuple(tensors.get_slice(name).get_shape()) for name in _weights_in(tensors)}
    return shapes


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight by our name, one at a time."""
    for file in files_of(path):
        with _opened(file) as tensors:
            for name in _weights_in(tensors):
                yield _ours(name), tensors.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error})") from None


def _weights_in(tensors: Any) -> list[str]:
    """Old conversions keep the rotary frequencies too, which follow from rope_theta."""
    return [name for name in tensors.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118


def _ours(name: str) -> str:
    return name.removeprefix("model.")


def their_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"
