"""Exports and imports of Hugging Face models, compared with transformers' reading and writing of them."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from data.sources.files import stdlib_files
from data.tokenizer import Tokenizer
from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.inference.hf_export import export
from pretrain.inference.pretrained import load_pretrained
from pretrain.inference.sampling import generate
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

SHAPES = {
    "llama-2": {},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "tied": {"tie_word_embeddings": True},
    "llama-3.2": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "linear": {},
}
ROPE = {
    "llama-2": {"rope_type": "default", "rope_theta": 10000.0},
    "grouped": {"rope_type": "default", "rope_theta": 500000.0},
    "tied": {"rope_type": "default", "rope_theta": 10000.0},
    "llama-3.2": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip
TINY = [
    "data=text", "model.vocab_size=500", "model.hidden_size=48", "model.intermediate_size=80",
    "model.num_hidden_layers=2", "model.num_attention_heads=6", "optim.rank=8", "optim.warmup_steps=1",
    "train.steps=3", "train.tokens_per_step=128", "train.seq_len=32", "train.eval_sequences=4", "train.eval_every=2",
    "train.log_every=1", "train.compile=false", "train.sample_tokens=0", "logger.wandb.mode=disabled",
]  # fmt: skip
IDS = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def overrides(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = [f"data.paths=[{root / 'models'},{root / 'optim'}]", "data.validation_share=0.2"]
    places = [f"run.root={folder}", f"data.root={folder / 'prepared'}"]
    return lambda *more: [*TINY, *corpus, *places, *more]


def trainer(overrides):
    config = load(overrides)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return Trainer(config, world, ready(config, 1), RunFolder(config), StopRequest())


@pytest.fixture(scope="module")
def run(overrides):
    """The folder of a short run."""
    run = trainer(overrides("run.name=run"))
    run.fit()
    return run.folder.path


@pytest.fixture(params=SHAPES)
def theirs(request, run, tmp_path):
    """A model of transformers, the folder it has saved it to in several files, and the overrides for its shape."""
    shape = SHAPES[request.param]
    sizes = {
        "vocab_size": 500, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, **shape,
    }  # fmt: skip
    rope = ROPE[request.param]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={**rope}, initializer_range=0.2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.copy(run / "tokenizer.model", folder)
    scaling = ",".join(f"{key}:{value}" for key, value in rope.items() if key != "rope_theta")
    changes = [f"model.{key}={value}" for key, value in {**shape, "rope_theta": rope["rope_theta"]}.items()]
    changes += [f"model.rope_scaling={{{scaling}}}"] if "factor" in rope else []
    return model, folder, changes


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def test_a_run_exports_to_what_transformers_reads_with_the_same_logits(run, tmp_path):
    ours, tokenizer = load_pretrained(run)
    export(run, tmp_path / "whole")
    export(run, tmp_path / "sharded", shard_bytes=100_000)
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32 and model.config.eos_token_id == tokenizer.eos_id
        assert (model(IDS).logits - ours(IDS)).abs().max() < 1e-4
        again, _ = load_pretrained(folder)
        assert torch.equal(again(IDS), ours(IDS))
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    assert not any("optim" in name or "rows" in name for name in tensors_in(tmp_path / "whole"))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        export(run, tmp_path / "whole")


@torch.no_grad()
def test_an_export_in_bf16_is_what_transformers_would_round_to(run, tmp_path):
    export(run, tmp_path / "half", torch.bfloat16)
    export(run, tmp_path / "whole")
    half, whole = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="bfloat16") for name in ("half", "whole")
    )
    assert torch.equal(half(IDS).logits, whole(IDS).logits)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_in(tmp_path / "half").values())


@torch.no_grad()
def test_a_hugging_face_model_comes_in_with_the_same_logits_and_goes_out_bit_for_bit(theirs, overrides, tmp_path):
    model, folder, changes = theirs
    run = trainer(overrides(f"run.root={tmp_path}", "run.name=in", f"train.init_from={folder}", *changes,
                            f"data.tokenizer={folder / 'tokenizer.model'}"))  # fmt: skip
    assert (run.model(IDS) - model(IDS).logits).abs().max() < 1e-4
    run.checkpoints.save(0, tensors_of(run.model, run.optim), run.state_dict())
    run.checkpoints.finish()
    export(tmp_path / "in", tmp_path / "out")
    before, after = tensors_in(folder), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype for name, tensor in after.items()
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again(IDS).logits == model(IDS).logits).all()
    assert again.config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("theirs", ["llama-3.2", "linear"], indirect=True)
@torch.no_grad()
def test_scaled_positions_generate_and_evaluate_as_transformers_does(theirs):
    model, folder, _ = theirs
    ours, _ = load_pretrained(folder)
    prompt = IDS[:1]  # longer than original_max_position_embeddings
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)[0].tolist()
    assert generate(ours, prompt[0].tolist(), 30, temperature=0, top_k=0, seed=0) == expected
    ids = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(ours(ids[:, :-1]).flatten(0, 1), ids[0, 1:])
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=0, atol=1e-5)


def test_a_run_starts_with_the_loss_of_its_initial_weights_and_no_optimizer_state(run, overrides, tmp_path):
    export(run, tmp_path / "out")
    ended = json.loads((run / "summary.json").read_text())["val/loss"]
    sources = {"run": run, "folder": tmp_path / "out", "file": tmp_path / "out" / "model.safetensors"}
    for name, source in sources.items():
        started = trainer(overrides(f"run.name=from-{name}", f"train.init_from={source}"))
        assert started.validate()["val/loss"] == ended
        assert started.step == 0 and not started.optim.optimizer.state


def test_a_run_resumes_from_its_checkpoint_and_not_from_its_initial_weights(run, overrides):
    more = overrides("run.name=resumed", f"train.init_from={run}")
    first = trainer(more)
    first.fit()
    second = trainer([*more, "train.steps=4"])
    assert second.step == 3
    for name, tensor in tensors_of(first.model, first.optim).items():
        assert torch.equal(tensors_of(second.model, second.optim)[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            r"set 'model\.rope_scaling=\{rope_type:linear,factor:8\.0\}'$",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling of type yarn is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported; only False is"),
        ({"head_dim": 16}, "head_dim=16 is not supported; only 8 is"),
        ({"model_type": "mistral"}, "model_type=mistral is not supported; only llama is"),
        ({"hidden_size": None}, "hidden_size"),
        ({"intermediate_size": 96}, r"another shape; set model\.intermediate_size=96"),
        ({"rope_theta": 500.0}, r"another shape; set model\.rope_theta=500\.0"),
    ],
)
def test_settings_that_the_model_does_not_implement_are_refused_before_any_compute(
    change, message, run, overrides, tmp_path
):
    export(run, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ConfigError, match=message):
        check(load(overrides(f"train.init_from={tmp_path / 'out'}")))


def test_missing_files_other_shapes_and_another_tokenizer_are_refused_by_name(run, overrides, tmp_path):
    export(run, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"train\.init_from: .* contains no model; name a run's folder"):
        check(load(overrides(f"train.init_from={tmp_path}")))
    file = tmp_path / "out" / "model.safetensors"
    with pytest.raises(ConfigError, match=r"mlp\.down_proj\.weight is \(48, 80\) there and \(48, 96\) in the model"):
        check(load(overrides(f"train.init_from={file}", "model.intermediate_size=96")))
    other = overrides(f"train.init_from={tmp_path / 'out'}", "data.seed=1", "data.name=other")
    with pytest.raises(ValueError, match=r"another tokenizer than the run; set data\.tokenizer=.*tokenizer\.model"):
        ready(load(other), 1)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(run, folder)
    return folder


def test_auto_tokenizer_gives_the_same_tokens_and_the_text_back_on_the_standard_library(exported):
    ours, theirs = Tokenizer(exported / "tokenizer.model"), AutoTokenizer.from_pretrained(exported)
    texts = [file.path.read_text(encoding="utf-8", errors="replace") for file in stdlib_files(30_000_000)[::40]]
    texts = [text for text in texts if not any(sign in text for sign in ("▁", "<s>", "</s>", "<unk>"))]
    assert len(texts) > 15
    for text in [*texts, " é😀  \r\n\n\t=========", "", "     x"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.encode("import") == [ours.bos_id, *ours.encode("import")]


@torch.no_grad()
def test_transformers_writes_the_same_greedy_tokens(exported, run):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("def", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    ids = prompt["input_ids"][0].tolist()
    assert written == generate(load_pretrained(run)[0], ids, 20, temperature=0, top_k=0, seed=0)


def test_an_exported_run_has_a_card_and_a_length_that_it_was_trained_on(exported, run, root):
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == AutoTokenizer.from_pretrained(exported).model_max_length == 32
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    header, card = (exported / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert card.startswith("\n# out\n")
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))
    assert facts["corpus"] == "text: models, optim" and facts["tokens trained on"] == "384"
    assert facts["rows trained"].startswith("8 of each linear layer") and facts["optimizer"] == "muon"
    assert facts["initial weights"] == "random" and facts["sequence length"] == "32"
    assert str(root) not in card and str(run.parent) not in card  # a card is published
    ended = json.loads((run / "summary.json").read_text())
    assert f"| 3 | 384 | {ended['val/loss']:.4f} | {ended['val/bits_per_byte']:.4f} |" in card
    assert "\n| 0 | 0 | " in card and "Last training loss: " in card
    assert f"{ended['parameters'] / 1e6:.1f}M parameters, trained for 3 steps of 128 tokens" in card


def test_the_card_of_an_earlier_checkpoint_has_no_later_losses(run, overrides, tmp_path):
    more = trainer(overrides("run.name=early", "train.checkpoint_every=2", f"train.init_from={run}"))
    more.fit()
    export(more.folder.path / "checkpoints" / "step-00000002", tmp_path / "early")
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| 2 | 256 | " in card and "| 3 | 384 | " not in card and "at step 2." in card
    assert f"| initial weights | {run.name} (SHA-256 `" in card and str(run.parent) not in card


def test_the_card_of_a_run_without_grass_names_its_optimizer_and_no_rows(overrides, tmp_path):
    dense = trainer([o for o in overrides("run.name=dense", "optim=adamw") if not o.startswith("optim.rank")])
    dense.fit()
    export(dense.folder.path, tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "| optimizer | adamw |" in card and "rows trained" not in card


def test_a_model_of_hugging_face_keeps_its_own_card(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("# Theirs\n")
    export(tmp_path / "theirs", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "# Theirs\n"
