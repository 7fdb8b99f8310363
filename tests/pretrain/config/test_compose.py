"""Configurations: every YAML file composes, and everything wrong with one is said at once, before any compute."""

import importlib.util
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from data.train_tokenizer import train_tokenizer
from optim.inner import INNER_OPTIMIZERS, REQUIREMENTS
from optim.schedule import warmup_updates
from pretrain.config.compose import CONF, compose, flat, load, to_config
from pretrain.config.schema import Config, ConfigError, GrassConfig, OptimConfig
from pretrain.setup.checks import check
from pretrain.setup.data import ready

GROUP_OPTIONS = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize(("group", "option"), GROUP_OPTIONS, ids=[f"{g}={o}" for g, o in GROUP_OPTIONS])
def test_every_yaml_composes_with_the_defaults_and_passes_the_check_if_its_package_is_there(group, option, tmp_path):
    (tmp_path / "some.txt").write_text("text")
    for split in ("train", "validation"):
        (tmp_path / f"c4-{split}.00000-of-00001.json.gz").touch()
    (tmp_path / "some.jsonl").write_text('{"prompt": "a", "response": "b"}')
    needs_paths = group == "experiment" or option in ("text", "instructions", "records", "c4")
    paths = [f"data.paths=[{tmp_path}]"] if needs_paths else []
    paths += [f"data.dataset={tmp_path}"] if option == "datasets" else []
    if option in ("mixture", "tokens"):
        model = train_tokenizer([file.read_text() for file in CONF.glob("*/*.yaml")], tmp_path / "t.model", 500, seed=0)
        corpora = ",".join(f"{{weight: {weight}, paths: ['{tmp_path}/*.txt']}}" for weight in (1, 2))
        paths += [
            f"data.tokenizer={model.path}",
            "model.vocab_size=500",
            *([f"data.mixture=[{corpora}]"] if option == "mixture" else [f"data.paths=[{tmp_path}/some.txt]"]),
        ]
    config = load([f"{group}={option}", *paths])
    assert isinstance(config, Config)
    package = INNER_OPTIMIZERS[config.optim.inner].partition(".")[0]
    absent = importlib.util.find_spec(package) is None
    with pytest.raises(ConfigError, match=REQUIREMENTS[package]) if absent else nullcontext():
        check(config)


def test_the_optimizers_have_schemas_of_their_own():
    assert type(load(["optim=adamw"]).optim) is OptimConfig
    assert type(load([]).optim) is GrassConfig
    with pytest.raises(ConfigError, match=r"optim\.rank=8: Key 'rank' (is )?not in 'OptimConfig'"):
        load(["optim=adamw", "optim.rank=8"])


def test_the_default_warmup_is_60_of_700_steps_and_fits_short_runs(tmp_path):
    config = load([])
    assert warmup_updates(config.optim.warmup_steps, config.train.steps) == 60
    (tmp_path / "some.txt").write_text("text")
    for steps in (50, 2, 1):
        check(load(["data=text", f"data.paths=[{tmp_path}]", f"train.steps={steps}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.reduce_dtype=int8", r"train\.reduce_dtype=int8 is unknown; choose from float32"),
        ("optim.rank=0", r"optim\.rank=0 must be between 1 and 256"),
        ("optim.rank=257", r"q_proj and 15 more: optim\.rank=257 must be between 1 and 256"),
        ("train.seq_len=2048", r"train\.seq_len=2048 is longer than model\.max_position_embeddings=1024"),
        ("train.tokens_per_step=1000", r"train\.tokens_per_step=1000 is not divisible"),
        ("train.steps=0", r"train\.steps=0 must be at least 1"),
        ("train.dtype=float8", r"train\.dtype=float8 is unknown; choose from float32"),
        ("train.resume=yes_please", r"train\.resume=yes_please is unknown"),
        ("optim.selection=best", r"optim\.selection=best is unknown; choose from top_r"),
        ("optim.score=guess", r"optim\.score=guess is unknown; choose from exact, sketch"),
        ("optim.state_at_refresh=drop", r"optim\.state_at_refresh=drop is unknown"),
        ("optim.side=top", r"optim\.side='top' is unknown; use auto, longer, rows, columns or neurons"),
        ("optim.schedule=line", r"optim\.schedule=line is unknown"),
        ("optim.patterns=[mlp]", r"optim\.patterns: 'mlp' matches no linear layer"),
        ("optim.betas=[0.9,1.0]", r"optim\.betas=.* must be two numbers"),
        ("optim.inner=adamax", r"optim\.inner=adamax is unknown; choose from adamw, .* or give the dotted path"),
        ("optim.momentum=1", r"optim\.momentum=1\.0 must be in \[0, 1\)"),
        ("optim.norm_growth=0.5", r"optim\.norm_growth=0\.5 must be greater than 1, or 0 for none"),
        ("optim.lr=0", r"optim\.lr=0\.0 must be greater than 0"),
        (
            "optim.warmup_steps=100000",
            r"optim\.warmup_steps=100000 leaves nothing of train\.steps=700; lower it, or .* share",
        ),
        ("optim.warmup_steps=60.5", r"optim\.warmup_steps=60\.5 is not a number of steps; round it, or give a share"),
        ("optim.warmup_steps=nan", r"optim\.warmup_steps=nan is not a number of steps"),
        ("model.hidden_size=250", r"model\.hidden_size=250"),
        ("model.attention=flash", r"model\.attention=flash: flash-attn needs"),
        ("logger.wandb.mode=maybe", r"logger\.wandb\.mode=maybe is unknown"),
        ("run.name='a:b'", r"run\.name='a:b' cannot be a folder below"),
        ("run.name=../elsewhere", r"run\.name='\.\./elsewhere' cannot be a folder below"),
        ("optim.linear_lr=nan", r"optim\.linear_lr=nan must be greater than 0 and finite"),
        ("optim.final_lr=5", r"optim\.final_lr=5\.0 must be between 0 and 1"),
        ("optim.refresh_warmup=-5", r"optim\.refresh_warmup=-5 must be between 0 and optim\.refresh_every"),
        ("optim.probe_steps=0", r"optim\.probe_steps=0 must be at least 1"),
        ("optim.patterns=[]", r"optim\.patterns=\[\] selects no layer"),
        ("train.checkpoint_every=-1", r"train\.checkpoint_every=-1 must be at least 0"),
        (
            "train.checkpointing=some",
            r"train\.checkpointing=some is unknown; choose none, full, every:N \(from 1\) or",
        ),
        ("train.matmul_precision=best", r"train\.matmul_precision=best is unknown; choose from highest, high, medium"),
        ("train.profile=698", r"train\.profile=698 records 698 steps after the first 3, but train\.steps=700;"),
        ("train.loss_chunk_tokens=0", r"train\.loss_chunk_tokens=0 must be at least 1"),
        ("data.vocab_size=500", r"data\.vocab_size=500 does not match model\.vocab_size=4096"),
        ("data.validation_share=2", r"data\.validation_share"),
        ("data.prompts=[caf\udce9]", r"data\.prompts: 'caf\\udce9' is not UTF-8"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_mend(override, message):
    with pytest.raises(ConfigError, match=message):
        check(load([override]))


def test_a_head_under_grass_cannot_be_scored_exactly_in_chunks():
    head = ["optim.patterns=[lm_head]", "train.loss_chunk_tokens=64"]
    check(load([*head, "optim.score=sketch"]))
    check(load(["train.loss_chunk_tokens=64", "optim.score=exact"]))
    with pytest.raises(ConfigError, match=r"optim\.score=exact scores the head .* train\.loss_chunk_tokens=null"):
        check(load([*head, "optim.score=exact"]))


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as error:
        check(load(["optim.rank=0", "train.seq_len=5000", "optim.lr=-1", "data.max_bytes=0"]))
    for part in ("optim.rank=0", "train.seq_len=5000", "optim.lr=-1", "data.max_bytes"):
        assert part in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(["optim.ranc=8", "train.steps=many", "model=llama_9b", "nothing=1"])
    for part in ("optim.rank", "'many'", "llama_7b", "nothing=1"):
        assert part in str(error.value)


def test_a_key_added_with_a_plus_must_be_known_too():
    with pytest.raises(ConfigError, match=r"train\.stepz is not a key of the configuration; did you mean train\.steps"):
        load(["+train.stepz=3"])
    with pytest.raises(ConfigError, match=r"optm=grass: .*did you mean optim\?"):
        load(["optm=grass"])


def test_an_experiment_that_is_not_there_and_a_plus_that_is_too_much_are_named():
    with pytest.raises(ConfigError, match=r"experiment can be .*c4_130m, .*; did you mean c4_60m\?"):
        load(["experiment=c4_61m"])
    with pytest.raises(ConfigError, match=r"\+experiment=c4_60m: .* remove the \+"):
        load(["+experiment=c4_60m"])


def test_a_side_that_is_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.side=0 must be auto"):
        check(load(["optim.side=0"]))


@pytest.mark.parametrize("override", ["model=3", "=0", "+=0"])
def test_a_group_that_is_given_a_number_and_an_override_without_a_name_are_named(override):
    with pytest.raises(ConfigError, match=f"^{re.escape(override)}: "):
        load([override])


def test_divisibility_counts_the_processes():
    fits_one = load(["train.tokens_per_step=1024", "train.micro_batch_size=4", "train.seq_len=256"])
    check(fits_one, world_size=1)
    with pytest.raises(ConfigError, match=r"= 4 × 256 × 2"):
        check(fits_one, world_size=2)


def text(tmp_path: Path, *overrides: str) -> Config:
    return load(["data=text", f"data.root={tmp_path / 'prepared'}", f"run.root={tmp_path}", *overrides])


def test_a_missing_an_empty_and_an_unreadable_folder_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(b"\xff\xfe\x00")
    for folder, message in (
        ("absent", "there is no file or folder .*absent; check data.paths"),
        ("empty", "empty contains no .*; check data.paths or data.patterns"),
        ("binary", "check data.paths"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(text(tmp_path, f"data.paths=[{tmp_path / folder}]"), 1)
    assert not (tmp_path / "llama_nano-grass").exists()


def test_a_vocabulary_mismatch_and_a_truncated_shard_are_refused(tmp_path, root):
    own = [f"data.paths=[{root / 'models'},{root / 'optim'}]", "data.validation_share=0.2"]
    prepared = ready(text(tmp_path, *own, "model.vocab_size=400"), 1)
    tokenizer = f"data.tokenizer={prepared.folder / 'tokenizer.model'}"
    with pytest.raises(ValueError, match="has 400 tokens; set it to 400"):
        ready(text(tmp_path, *own, tokenizer), 1)
    with pytest.raises(ConfigError, match=r"data\.vocab_size=400 does not match model\.vocab_size=4096"):
        ready(text(tmp_path, *own, tokenizer, "data.vocab_size=400"), 1)
    shard = next(prepared.folder.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{shard.name}.*delete the folder"):
        ready(text(tmp_path, *own, "model.vocab_size=400"), 1)


def test_the_command_line_gives_one_message_no_traceback_and_leaves_nothing(root, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pretrain.preflight", "optim.rank=0", f"run.root={tmp_path / 'runs'}"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "optim.rank=0" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_a_tied_head_under_grass_is_refused_with_its_mend():
    head = ["optim.patterns=[lm_head]", "optim.rank=64"]
    check(load(head))
    with pytest.raises(ConfigError, match=r"lm_head: has a tied weight .*set model\.tie_word_embeddings=false"):
        check(load([*head, "model.tie_word_embeddings=true"]))


def test_a_setting_that_is_a_mapping_is_compared_as_one_value():
    before = flat(OmegaConf.structured(load([])))
    after = flat(OmegaConf.structured(load(["model.rope_scaling={rope_type:linear,factor:2.0}", "optim.rank={*:9}"])))
    assert before.keys() == after.keys()
    assert {key: after[key] for key in after if after[key] != before[key]} == {
        "model.rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "optim.rank": {"*": 9},
    }


@pytest.mark.parametrize("name", ["grass", "muon", "normuon"])
def test_the_default_rate_of_muon_falls_as_1_over_the_hidden_size_and_a_given_one_does_not(name):
    rates = [load([f"optim={name}", f"model.hidden_size={size}"]).optim.linear_lr for size in (128, 256, 2048)]
    assert rates == [6e-3, 3e-3, 3.75e-4]
    assert load([f"optim={name}", "model.hidden_size=2048", "optim.linear_lr=1e-3"]).optim.linear_lr == 1e-3
    own = load([f"optim={name}", "model.hidden_size=512", "optim.linear_lr=${by_width:1e-3,2048}"])
    assert own.optim.linear_lr == 4e-3


@pytest.mark.parametrize(
    "given", [":abc,128", ":6e-3", ":", ":1,2,3", ":null,128", ":true,128", ":6e-3,[1]", ":6e-3,0"]
)
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_wrong_use_of_by_width_is_reported_with_the_key_and_the_correct_form(given, quote):
    override = f"optim.linear_lr={quote}${{by_width{given}}}{quote}"
    with pytest.raises(ConfigError) as error:
        load(["train.steps=9", override])
    assert str(error.value) == (
        f"{override}: by_width needs two numbers, a rate and the hidden size at which it holds; "
        "write it like 'optim.linear_lr=${by_width:6.0e-3,128}'"
    )


def test_a_wrong_use_of_by_width_in_a_file_is_reported_with_the_key_and_the_value():
    config = compose([])
    config.optim.lr = "${by_width:6e-3}"
    with pytest.raises(
        InterpolationResolutionError, match=r"optim\.lr=\${by_width:6e-3}: by_width needs two numbers, "
    ):
        to_config(config)
