"""Write a model in Hugging Face's format: config.json, safetensors, tokenizer, generation settings, model card."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.atomic import UNFINISHED, use_umask
from data.tokenizer import Tokenizer
from pretrain.inference.hf_assets import (
    GENERATION,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    copy_assets,
    find_assets,
    has_tokenizer,
    other_settings,
)
from pretrain.inference.hf_llama import CONFIG, INDEX, WEIGHTS, hf_name, model_config
from pretrain.inference.hf_tokenizer import conversion_problem, tokenizer_config, tokenizer_json
from pretrain.inference.model_card import CARD, model_card
from pretrain.inference.pretrained import PretrainedModel, find_pretrained

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000


def export(path: str | Path, out: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model at ``path`` in Hugging Face format to the new folder ``out``.

    For a Hugging Face model, or a run that started from one, the generation settings are copied unchanged. If the
    tokenizer is still that model's, its chat template and special tokens are copied too. Otherwise a new
    tokenizer_config.json is written, with the length of the training sequences as ``model_max_length``. The embedding
    keeps all rows, including padding. A run gets a new model card; a Hugging Face model keeps its own.

    Args:
        path: as for ``find_pretrained``.
        dtype: the dtype of all written weights; None for the model's dtype.
        shard_bytes: maximum size of a file of weights; a single larger tensor gets a separate file.

    Raises:
        ValueError: there is no readable model or tokenizer at ``path``, or ``out`` exists.
    """
    found, out = find_pretrained(path), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten; choose another folder")
    temporary = out.with_name(f".{out.name}{UNFINISHED}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = dtype or found.dtype
    _write_weights(temporary, _weights(found, dtype), shard_bytes)
    _write_settings(temporary, found, dtype)
    _write_card(temporary, found, out.name)
    temporary.rename(out)
    logger.info("exported %s to %s in %s", found.path, out, str(dtype).removeprefix("torch."))
    logger.info("files: %s", ", ".join(sorted(file.name for file in out.iterdir())))


def _weights(found: PretrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights in ``dtype`` by Hugging Face's names; logs the number of weights that this rounds."""
    tensors, rounded = {}, []
    for name, tensor in found.weights():
        if name == "lm_head.weight" and found.arguments.get("tie_word_embeddings"):
            continue
        cast = tensor.to(dtype)
        if not torch.equal(cast.to(tensor.dtype), tensor):
            rounded.append((name, tensor.dtype))
        tensors[hf_name(name)] = cast
    if rounded:
        name, stored = rounded[0]
        kept = str(stored).removeprefix("torch.")
        logger.info("rounded %d weights to %s, such as %s; --dtype=%s is exact", len(rounded), dtype, name, kept)
    return tensors


def _write_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """One file, or shards of at most ``shard_bytes`` (except for a single larger tensor) and their index."""
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for file, shard in zip(names, shards, strict=True):
        save_file({name: tensors[name].contiguous() for name in shard}, folder / file, metadata={"format": "pt"})
        use_umask(folder / file)  # safetensors makes it readable only by its owner
    if len(shards) > 1:
        file_of = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """The names of ``tensors`` in groups of at most ``shard_bytes``, in their order."""
    shard, size = list[str](), 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _write_settings(folder: Path, found: PretrainedModel, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and the tokenizer, or copies of the model's original files."""
    path = found.tokenizer()
    assets = {asset.name: asset for asset in find_assets(found.assets)} if found.assets else {}
    tokenizer = Tokenizer(path)
    settings = model_config(found.arguments, dtype)
    brought = other_settings(found.assets, settings) if found.assets else {}
    settings |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} | brought
    _write_json(folder / CONFIG, settings)
    if GENERATION in assets:
        copy_assets([assets[GENERATION]], folder)
    else:
        _write_json(folder / GENERATION, {key: settings[key] for key in ("bos_token_id", "eos_token_id")})
    if found.assets and has_tokenizer(found.assets, path):
        copy_assets([assets[name] for name in TOKENIZER_FILES if name in assets], folder)
    if not (folder / TOKENIZER_CONFIG).exists():
        _write_tokenizer(folder, tokenizer, found.seq_len)


def _write_card(folder: Path, found: PretrainedModel, name: str) -> None:
    """Write the model card: for a run a new one, for a Hugging Face model the original."""
    if found.run is not None:
        (folder / CARD).write_text(model_card(found, found.run, name), encoding="utf-8")
    elif found.assets and (found.assets / CARD).exists():
        copy_assets([found.assets / CARD], folder)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, positions: int) -> None:
    """Write the tokenizer's file, and the files that transformers' AutoTokenizer needs."""
    copy = tokenizer.copy_to(folder)
    if copy.name == "tokenizer.json":
        special = {f"{key}_token": name for key, name in tokenizer.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **special}
        _write_json(folder / TOKENIZER_CONFIG, config)
    elif problem := conversion_problem(copy):
        logger.warning(
            "wrote only tokenizer.model; it cannot be converted to the tokenizer.json of AutoTokenizer, because %s",
            problem,
        )
    else:
        _write_json(folder / "tokenizer.json", tokenizer_json(copy))
        _write_json(folder / TOKENIZER_CONFIG, tokenizer_config(copy, positions))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
