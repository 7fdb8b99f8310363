"""The model held to Hugging Face's Llama, to its published sizes, and to its word on dtypes and draws."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from models.llama import Llama, RMSNorm
from models.rope import rope_tables, rotate

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
}
CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


def small(seed=0, **changes):
    model = Llama(**SMALL | changes)
    model.init_weights(seed)
    return model


def tokens(batch=2, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=generator)


def hugging_face_twin(model, **changes):
    sizes = SMALL | changes
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta", 10000.0)}
    twin = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).eval()
    state = {(k if k.startswith("lm_head") else f"model.{k}"): v for k, v in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.fixture(params=VARIANTS)
def pair(request):
    """A model whose weights are large enough for its logits to matter, and its Hugging Face twin."""
    changes = VARIANTS[request.param]
    model = small(initializer_range=0.2, **changes)
    for number, parameter in enumerate(p for n, p in model.named_parameters() if n.endswith("norm.weight")):
        parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(number))
    return model, hugging_face_twin(model, **changes)


def test_logits_equal_hugging_face(pair):
    model, twin = pair
    ids = tokens(length=SMALL["max_position_embeddings"])
    with torch.no_grad():
        ours, theirs = model(ids), twin(ids).logits
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 5e-5


def test_loss_and_gradients_equal_hugging_face(pair):
    model, twin = pair
    ids = tokens(length=33)
    loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    theirs = twin(ids, labels=ids).loss
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    gradients = {name.removeprefix("model."): p.grad for name, p in twin.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_loss_is_the_sum_over_targets_that_are_not_ignored():
    model, ids = small().double(), tokens(length=17)
    targets = ids[:, 1:].clone()
    targets[0, :5] = -100
    log_probabilities = model(ids[:, :-1]).log_softmax(-1)
    by_hand = -sum(log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] != -100)
    loss = model(ids[:, :-1], targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, by_hand, rtol=1e-13, atol=0)


def test_loss_of_only_ignored_targets_is_zero():
    assert small()(tokens(), torch.full((2, 16), -100)).item() == 0


def test_a_later_token_never_changes_an_earlier_logit():
    model, ids = small(num_key_value_heads=3), tokens()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % SMALL["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_rotated_products_depend_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(64, 8, 10000.0, like=q)
    q, k = (rotate(x.expand(1, 64, 1, 8), cos, sin).squeeze(2) for x in (q, k))
    products = (q @ k.mT)[0]
    for distance in (0, 1, 17):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(products[0, 0], products[0, 17])


def test_norm_computes_in_fp32_under_bf16():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-6)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_rotation_computes_in_fp32_under_bf16():
    x = torch.randn(1, 300, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rotate(x, *rope_tables(300, 16, 10000.0, like=x))
    assert torch.equal(rotated, rotate(x.float(), *rope_tables(300, 16, 10000.0, like=x.float())).bfloat16())


def test_a_float64_model_rounds_nothing_to_fp32():
    model = small(num_hidden_layers=1, num_key_value_heads=2, initializer_range=0.3).double()
    weight, ids = model.layers[0].self_attn.k_proj.weight, tokens(length=9)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    step = 1e-5 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += step
        above = model(ids[:, :-1], ids[:, 1:])
        weight -= 2 * step
        below = model(ids[:, :-1], ids[:, 1:])
    # Central differences are good to about 1e-9 here; one fp32 rounding on the way would leave 1e-2.
    torch.testing.assert_close((above - below) / 2e-5, weight.grad.norm(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_bf16_model_keeps_norm_weights_in_fp32(changes):
    model = small(**changes)
    model.norm.weight.data.fill_(1 + 2**-12)
    reference, ids = small(**changes), tokens()
    reference.norm.weight.data.fill_(1 + 2**-12)
    assert model.to_dtype(torch.bfloat16) is model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("norm.weight") else torch.bfloat16)
    assert torch.equal(model.norm.weight, reference.norm.weight)
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.tie_word_embeddings
    logits, loss = model(ids), model(ids, ids)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    expected = reference(ids)
    assert (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_initialisation_by_way_of_the_meta_device_is_the_same(changes):
    with torch.device("meta"):
        model = Llama(**SMALL | changes)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights(7)
    direct = small(seed=7, **changes)
    assert model.state_dict().keys() == direct.state_dict().keys()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(tokens()), direct(tokens()))
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.tie_word_embeddings


def test_a_tied_head_stays_tied_when_weights_are_loaded_after_the_meta_device():
    trained = small(tie_word_embeddings=True)
    with torch.device("meta"):
        model = Llama(**SMALL | {"tie_word_embeddings": True})
    model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model(tokens()), trained(tokens()))


def test_a_draw_depends_only_on_seed_and_name():
    reference = small(seed=1).state_dict()
    larger = Llama(**SMALL | {"num_hidden_layers": 5, "vocab_size": 200})
    for children in (larger._modules, larger.layers._modules, larger.layers[0].mlp._modules):
        reverse = list(children.items())[::-1]
        children.clear()
        children.update(reverse)
    larger.add_module("another", torch.nn.Linear(3, 3))
    torch.manual_seed(123)
    larger.init_weights(1)
    drawn = larger.state_dict()
    for name in reference.keys() - {"embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(reference[name], drawn[name]), name


def test_other_seeds_and_other_names_give_other_draws():
    model, other = small(seed=1), small(seed=2)
    draws = [
        parameter.flatten()[:64]
        for m in (model, other)
        for name, parameter in m.named_parameters()
        if not name.endswith("norm.weight")
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_initialisation_leaves_the_global_generator_and_foreign_parameters_alone():
    model = Llama(**SMALL)
    model.layers[0].mlp.up_proj.rows = torch.nn.Parameter(torch.full((2, 48), 5.0))
    before = torch.get_rng_state()
    model.init_weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.layers[0].mlp.up_proj.rows == 5).all()


def test_weights_are_normal_with_the_given_spread_and_norms_are_one():
    model = small(hidden_size=192, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert abs(parameter.mean()) < 5 * 0.05 / parameter.numel() ** 0.5, name
            assert abs(parameter.std() / 0.05 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


def test_a_bf16_model_starts_from_the_rounded_draws():
    model = Llama(**SMALL).to_dtype(torch.bfloat16)
    model.init_weights(0)
    for name, tensor in small().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name


PARAMETERS = {  # in millions; all but micro, nano and 1b_5504 as published for these sizes
    "micro": "1.8",
    "nano": "5.3",
    "60m": "58.1",
    "130m": "134",
    "350m": "368",
    "1b": "1339",
    "1b_5504": "1345",
    "3b": "2686",
    "7b": "6738",
    "13b": "13016",
}


def arguments(path):
    """The arguments of Llama in a model config: all keys except `defaults` and `name`, which are Hydra's."""
    config = yaml.safe_load(path.read_text())
    return {key: value for key, value in config.items() if key not in ("defaults", "name")}


@pytest.mark.parametrize("path", sorted(CONF.glob("llama_*.yaml")), ids=lambda path: path.stem)
def test_config_has_every_argument_and_the_parameter_count_it_states(path):
    signature = inspect.signature(Llama.__init__)
    assert [name for name in signature.parameters if name != "self"] == list(arguments(path))
    with torch.device("meta"):
        model = Llama(**arguments(path))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    stated = re.fullmatch(r"# ([\d.]+)M parameters", path.read_text().splitlines()[0])[1]
    decimals = len(stated.partition(".")[2])
    assert f"{millions:.{decimals}f}" == stated
    assert stated == PARAMETERS[path.stem.removeprefix("llama_")]


def test_there_is_a_config_for_every_size():
    assert {path.stem for path in CONF.glob("llama_*.yaml")} == {f"llama_{size}" for size in PARAMETERS}


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({key: 0}, f"model.{key}=0 must be above 0") for key in (*SMALL, "num_key_value_heads")),
        *(({key: -1.0}, f"model.{key}=-1.0 must be") for key in ("rms_norm_eps", "rope_theta", "initializer_range")),
        ({"rms_norm_eps": float("nan")}, "model.rms_norm_eps=nan must be above 0"),
        ({"hidden_size": 50}, "model.hidden_size=50: .* multiple of 2 · model.num_attention_heads = 12"),
        ({"hidden_size": 54}, "model.hidden_size=54: .* heads of one even size"),
        ({"num_key_value_heads": 4}, "model.num_key_value_heads=4 must divide model.num_attention_heads=6"),
        ({"num_key_value_heads": 12}, "model.num_key_value_heads=12 must divide"),
        ({"attention": "fast"}, "model.attention=fast is unknown; choose from auto, sdpa, flash"),
    ],
)
def test_an_impossible_size_is_named_with_its_mend(changes, message):
    with pytest.raises(ValueError, match=message):
        Llama(**SMALL | changes)


def test_all_impossible_sizes_are_named_at_once():
    with pytest.raises(ValueError) as error:
        Llama(**SMALL | {"vocab_size": 0, "hidden_size": 50, "num_key_value_heads": 4, "attention": "fast"})
    named = [re.match(r"model\.(\w+)=", line)[1] for line in str(error.value).splitlines()]
    assert named == ["vocab_size", "hidden_size", "num_key_value_heads", "attention"]


def test_a_sequence_longer_than_the_positions_is_refused():
    model = small()
    assert model(tokens(1, 128)).shape == (1, 128, 97)
    with pytest.raises(ValueError, match=r"129 tokens .* model.max_position_embeddings=128; lower"):
        model(tokens(1, 129))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compile_to_one_graph_that_all_layers_share(dtype):
    torch._dynamo.reset()
    model = small(num_key_value_heads=2).to_dtype(dtype)
    ids = tokens()
    loss = model(ids, ids)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    compiled_loss = model(ids, ids)
    compiled_loss.backward()
    assert counter.frame_count == 1
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(compiled_loss, loss, rtol=tolerance, atol=0)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).float().norm() / expected[name].float().norm()
        assert error < tolerance, name
