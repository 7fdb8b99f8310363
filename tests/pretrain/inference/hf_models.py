"""Tiny LLaMAs in Hugging Face's format, with tokenizers of both kinds, as transformers writes them."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from data.train_tokenizer import train_tokenizer

TEXTS = [f"alpha {n} beta gamma river stone {n * n} cloud, water bird {n % 7} house.\n" * 4 for n in range(60)]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OVERRIDES = [f"model.{key}={value}" for key, value in SIZES.items()]
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>", "<|pad|>"]


def sentencepiece(folder: Path, tokens: int = 300) -> Path:
    """A tokenizer.model of this many tokens; 1 and 2 are bos and eos."""
    return train_tokenizer(TEXTS, folder / "tokenizer.model", tokens, seed=0).path


def byte_level(folder: Path, tokens: int = 300, special: list[str] = SPECIAL) -> Path:
    """A tokenizer.json of this many tokens, followed by the ``special`` ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def llama(folder: Path, rows: int, **config: object) -> LlamaForCausalLM:
    """A random model with this many embedding rows, saved to ``folder``."""
    torch.manual_seed(0)
    positions = {"max_position_embeddings": 128, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES, **positions, **config)).eval()
    model.save_pretrained(folder)
    return model


def write_json(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; ... for a value removes the key."""
    content = json.loads(path.read_text()) | changes
    write_json(path, **{key: value for key, value in content.items() if value is not ...})
