"""A trained model for others: a folder that Hugging Face's transformers, and whatever reads its files, can load.

python -m pretrain.export runs/x --out folder writes config.json, the weights as safetensors and the tokenizer. The
optimizer's state stays in the run.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.tokenizer import Tokenizer, find_tokenizer
from models.precision import DTYPES
from pretrain.cli.errors import clear_errors
from pretrain.inference import hf_llama as hugging_face
from pretrain.inference import hf_tokenizer as hugging_face_tokenizer
from pretrain.inference.pretrained import PretrainedModel, find_pretrained

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000


def export(path: str | Path, out: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model at ``path`` to the new folder ``out``, in its own dtype unless another is asked for.

    Raises:
        ValueError: there is no model at ``path``, or something at ``out``.
    """
    found, out = find_pretrained(path), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten; name another folder")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = dtype or found.dtype
    _write_weights(temporary, _in(dtype, found), shard_bytes)
    _write_tokenizer(temporary, found.tokenizer(), found.arguments["max_position_embeddings"])
    tokenizer = Tokenizer(find_tokenizer(temporary) or found.tokenizer())
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(temporary / hugging_face.CONFIG, {**hugging_face.as_config(found.arguments, dtype), **special})
    _write_json(temporary / "generation_config.json", special)
    temporary.rename(out)
    logger.info("exported %s to %s in %s", found.path, out, str(dtype).removeprefix("torch."))


def _in(dtype: torch.dtype, found: PretrainedModel) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, all in one dtype as they keep them; says whose values that rounds."""
    tensors, rounded = {}, []
    for name, tensor in found.weights():
        if name == "lm_head.weight" and found.arguments.get("tie_word_embeddings"):
            continue
        cast = tensor.to(dtype)
        if not torch.equal(cast.to(tensor.dtype), tensor):
            rounded.append(name)
        tensors[hugging_face.their_name(name)] = cast
    if rounded:
        logger.info("rounded to %s: %d weights, such as %s (--dtype keeps them)", dtype, len(rounded), rounded[0])
    return tensors


def _write_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """One file, or shards of at most ``shard_bytes`` (a single larger tensor apart) and their index."""
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [hugging_face.WEIGHTS]
    for file, shard in zip(names, shards, strict=True):
        save_file({name: tensors[name].contiguous() for name in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / hugging_face.INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    shard, size = list[str](), 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _write_tokenizer(folder: Path, model: Path, positions: int) -> None:
    tokenizer = Tokenizer(model)
    if tokenizer.copy_to(folder).name == "tokenizer.json":
        special = {f"{key}_token": name for key, name in tokenizer.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **special}
        _write_json(folder / "tokenizer_config.json", config)
        return
    if reason := hugging_face_tokenizer.obstacle(model):
        logger.warning("wrote tokenizer.model alone, without a tokenizer.json for AutoTokenizer: %s", reason)
        return
    _write_json(folder / "tokenizer.json", hugging_face_tokenizer.tokenizer_json(model))
    _write_json(folder / "tokenizer_config.json", hugging_face_tokenizer.tokenizer_config(model, positions))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m pretrain.export", description=__doc__)
    p.add_argument("model", help="a run's folder or one of its checkpoints")
    p.add_argument("--out", required=True, help="the folder to write, which must not exist")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; by default that of the run")
    p.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="of a file (default: %(default)g)")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with clear_errors():
        export(args.model, args.out, DTYPES[args.dtype] if args.dtype else None, int(args.shard_gb * 1e9))


if __name__ == "__main__":
    main()
