"""config.json and safetensors files are read as transformers reads them, or refused in a line for each reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from models.llama import Llama
from models.weights import fill_weights
from pretrain.inference.hf_llama import read_arguments, read_shapes, read_weights
from tests.pretrain.inference.hf_models import change_json, llama

IDS = torch.randint(60, (2, 100), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SAME = {
    "as saved": {},
    "no number of heads for keys": {"num_key_value_heads": ...},
    "null heads for keys": {"num_key_value_heads": None},
    "rope_theta, as before transformers 5": {"rope_parameters": ..., "rope_theta": 500.0},
    "both, which differ": {"rope_theta": 500.0},
    "no rotary settings": {"rope_parameters": ...},
    "no scaling": {"rope_scaling": None},
    "scaling of the default type": {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    "linear scaling by 1": {
        "rope_parameters": ...,
        "rope_theta": 5e3,
        "rope_scaling": {"type": "linear", "factor": 1.0},
    },
    "linear scaling, by transformers 5": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    },
    "linear scaling, by its first name": {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}},
    "scaling of Llama 3.1, by transformers 5": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "scaling of Llama 3.1, before": {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "both, of which the older counts": {"rope_scaling": LLAMA3},
    "scaling of Llama 3.1 without the positions before": {
        "rope_parameters": ...,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
    },
    "another name of silu": {"hidden_act": "swish"},
    "the dtype's older key": {"dtype": ..., "torch_dtype": "float32"},
    "no dtype": {"dtype": ...},
    "no size of heads": {"head_dim": ...},
    "null size of heads": {"head_dim": None},
    "an older key of the positions": {"max_position_embeddings": ..., "max_sequence_length": 4096},
    "keys left out that have defaults": {"rms_norm_eps": ..., "tie_word_embeddings": ..., "hidden_act": ...},
    "unknown keys": {"pretraining_tp": 2, "transformers_version": "4.28.0", "model_max_length": 7},
    "another class's name": {"architectures": ["LLaMAForCausalLM"]},
}
OTHER = {
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "model_type": {"model_type": "mistral"},
    "head_dim": {"head_dim": 64},
    "type yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
    "low_freq_factor is missing": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
    "type dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "factor=0 must be a number above 0": {"rope_scaling": {"type": "linear", "factor": 0}},
    "only linear and llama3 are": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "dtype": {"dtype": "int8"},
    "hidden_size is missing": {"hidden_size": ..., "head_dim": ...},
}


@pytest.fixture
def folder(tmp_path):
    llama(tmp_path, 64)
    return tmp_path


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
@torch.no_grad()
def test_settings_by_other_names_mean_what_transformers_takes_them_for(folder, changes):
    change_json(folder / "config.json", **changes)
    arguments, dtype = read_arguments(folder)
    theirs = LlamaConfig.from_pretrained(folder)
    heads = arguments["num_key_value_heads"] or arguments["num_attention_heads"]
    plain = {key: value for key, value in arguments.items() if key not in ("rope_theta", "rope_scaling")}
    assert {**plain, "num_key_value_heads": heads} == {key: getattr(theirs, key) for key in plain}
    rope = {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
    if rope.get("factor") != 1:
        scaling = arguments["rope_scaling"] or {"rope_type": "default"}
        assert {**scaling, "rope_theta": arguments["rope_theta"]} == rope
    model = Llama(**arguments).to_dtype(dtype).eval()
    fill_weights(model, read_weights(folder), folder)
    assert (model(IDS) - AutoModelForCausalLM.from_pretrained(folder)(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("reason", "changes"), OTHER.items(), ids=OTHER)
def test_settings_that_the_model_does_not_implement_are_refused_in_one_line(folder, reason, changes):
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=reason) as error:
        read_arguments(folder)
    assert len(str(error.value).splitlines()) == 1 and str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b'"llama"', b"{", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|is not a JSON object).*; give a folder"):
        read_arguments(folder)


WEIGHTS = {
    "as saved": lambda weights: weights,
    "without the prefix": lambda weights: {name.removeprefix("model."): t for name, t in weights.items()},
    "with rotary frequencies": lambda weights: (
        weights | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    ),
}


@pytest.mark.parametrize("renamed", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_have_our_names_however_they_were_saved(folder, renamed):
    before = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(renamed(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    found = dict(read_weights(folder))
    assert found.keys() == before.keys() == read_shapes(folder).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("content", [b"", b"{}", b'{"weight_map": 3}', b"\x00"])
def test_an_index_that_is_garbage_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        read_shapes(folder)


def test_a_missing_shard_and_pickled_weights_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"there is no .*model\.safetensors; convert weights in other formats"):
        read_shapes(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"there is no .*model-00001-of-00002.*; copy the model again"):
        read_shapes(folder)
