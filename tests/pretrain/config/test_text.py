"""Settings that are text stay as they were typed: on the command line, in sweeps, in YAML and in a run's folder."""

import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain.config import compose
from pretrain.config.compose import flat, load, read_config
from pretrain.config.schema import ConfigError
from pretrain.config.text import as_typed, quoted, split
from pretrain.sweep import begin, combinations, job_name, parse

# Text that Hydra or YAML would read as something else.
LIKE_NUMBERS = [
    "2024_111", "20241_11", "3e4", "1_000", "007", "0x1F", "1.0", "-5", "+3", ".5", "1e-3", "10:30", "2024-01-01",
    "true", "False", "yes", "off", "NULL", "nan", "inf", "-inf", "~", "1,000",
]  # fmt: skip
# Text that Hydra's grammar refuses.
EVERYDAY = [
    "données", "日本語", "date=2024-01-01", "My Corpus (1)", "a&b", "it's", "100%", "a#b", "x;y", "Ωmega", "naïve café",
    "😀", "50€", "a:b=c", "semi;colon!", "[draft] v2", "{x}", "back\\slash", 'say "hi"', "~/texts", "wiki^2",
    "a < b > c", "q?", "*", "tab\tbed", "line\nbreak", "a, b and c", "(", "don't, won't", "C:\\data\\x",
]  # fmt: skip
SAMPLES = [*LIKE_NUMBERS, *EVERYDAY]
TEXT_KEYS = [
    "run.name", "run.root", "data.name", "data.root", "data.tokenizer", "data.column", "data.dataset", "data.bos",
    "data.dataset_revision", "train.init_from", "logger.wandb.project", "logger.wandb.entity", "logger.wandb.group",
    "model.name", "optim.name",
]  # fmt: skip
LIST_KEYS = ["data.paths", "data.patterns", "data.validation_paths", "data.prompts", "optim.patterns"]


def value_of(overrides: list[str], key: str):
    return OmegaConf.select(OmegaConf.structured(load(overrides)), key)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_is_taken_as_it_was_typed(text):
    assert value_of([f"run.name={text}"], "run.name") == text
    assert value_of([f"++run.name={quoted(text)}"], "run.name") == text


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_every_setting_that_is_text_is_taken_so(key):
    overrides = [f"{key}={text}" for text in ("2024_111", "données (1)")]
    assert [value_of([override], key) for override in overrides] == ["2024_111", "données (1)"]


@pytest.mark.parametrize("key", LIST_KEYS)
def test_every_list_of_text_is_taken_so(key):
    # Commas and brackets have a meaning in a list: there a text that has them is quoted.
    plain = [text for text in SAMPLES if not set(text) & set("[]{}(),") and text != 'say "hi"']
    assert value_of([f"{key}=[{','.join(plain)}]"], key) == plain
    assert value_of([f"{key}=[{', '.join(map(quoted, SAMPLES))}]"], key) == SAMPLES


@pytest.mark.parametrize("text", [text for text in SAMPLES if "," not in text and not text.startswith("[")])
def test_a_list_of_one_may_go_without_brackets(text):
    assert value_of([f"data.paths={text}"], "data.paths") == [text]


def test_brackets_and_apostrophes_in_a_list():
    for value, texts in [
        ("[My Corpus (1), it's, don't]", ["My Corpus (1)", "it's", "don't"]),
        ("['a,b', \"c]d\"]", ["a,b", "c]d"]),
        ("[report [v2], notes (a, b)]", ["report [v2]", "notes (a, b)"]),
        ("[ a ,b  c ]", ["a", "b  c"]),
        ("[src/**/*.py, ~/notes]", ["src/**/*.py", "~/notes"]),
        ("[a\\,b]", ["a,b"]),
        ("[]", []),
    ]:
        assert value_of([f"data.paths={value}"], "data.paths") == texts, value


def test_null_is_no_text_where_a_setting_can_be_absent():
    assert value_of(["data.tokenizer=null"], "data.tokenizer") is None
    assert value_of(["data.tokenizer='null'"], "data.tokenizer") == "null"
    assert value_of(["run.name=null"], "run.name") == "null"


def test_interpolations_and_other_types_are_left_to_hydra():
    assert value_of(["run.name=${model.name}-é"], "run.name") == "llama_nano-é"
    config = load(["optim.rank={*:64,up_proj:16}", "train.steps=1_000", "optim.betas=[0.9,0.95]", "optim.side=columns"])
    assert (config.optim.rank, config.train.steps) == ({"*": 64, "up_proj": 16}, 1000)
    assert (config.optim.betas, config.optim.side) == ([0.9, 0.95], "columns")


def test_text_in_sections_and_mixtures_is_taken_so():
    assert load(["logger.wandb={mode: offline, project: 2024_1, group: null}"]).logger.wandb.project == "2024_1"
    corpora = "[{weight: 3, source: records, paths: [2024_1, 'a,b']}, {weight: 1, column: 007, paths: données}]"
    first, second = load(["data=mixture", f"data.mixture={corpora}"]).data.mixture
    assert (first["weight"], first["paths"]) == (3, ["2024_1", "a,b"])
    assert (second["column"], second["paths"]) == ("007", ["données"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12), min_size=1, max_size=3)
)
@example(["a\\", "'", '"'])
@example(["\\\\'", '\\"'])
def test_any_text_can_be_quoted(texts):
    texts = [text for text in texts if "$" not in text and text.strip()]
    override = f"data.paths=[{', '.join(map(quoted, texts))}]"
    assert split(override[len("data.paths=[") : -1]) == (list(map(quoted, texts)) or [""])
    assert value_of([override], "data.paths") == texts


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("data.paths=a,b", "data.paths=[a,b]"),
        ("data.paths=My notes, more", "data.paths=[My notes, more]"),
        ("optim.rank=é", 'optim.rank="é"'),
        ("optim.stagger=(1)", 'optim.stagger="(1)"'),
    ],
)
def test_a_value_that_cannot_be_read_is_answered_with_the_form_to_type(override, advice):
    with pytest.raises(ConfigError) as error:
        load([override])
    message = str(error.value)
    assert message.startswith(f"{override}: ") and shlex.quote(advice) in message
    assert "Exception" not in message and "hydra.cc" not in message


def test_text_in_yaml_files_is_taken_as_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "conf").symlink_to(compose.CONF)
    folder = tmp_path / "own"
    folder.mkdir()
    for entry in compose.CONF.iterdir():
        if entry.name != "experiment":
            (folder / entry.name).symlink_to(entry)
    (folder / "experiment").mkdir()
    (folder / "experiment" / "2024_11.yaml").write_text(
        "# @package _global_\n"
        "run: {name: 2024_111, root: 3e4}\n"
        "data:\n"
        "  paths: 1_000\n"
        "  tokenizer: 007\n"
        "  prompts: [yes, 10:30, 0x1F, ~, 'null', 2024-01-01, \"1.0\", données]\n"
        "  column: off\n"
        "  mixture: [{weight: 2, paths: [1_0, x]}]\n"
        "train: {steps: 1_000}\n"
        "logger: {wandb: {project: no, group: null}}\n"
    )
    monkeypatch.setattr(compose, "CONF", folder)
    config = load(["experiment=2024_11"])
    assert (config.run.name, config.run.root, config.train.steps) == ("2024_111", "3e4", 1000)
    assert (config.data.paths, config.data.tokenizer, config.data.column) == (["1_000"], "007", "off")
    assert config.data.prompts == ["yes", "10:30", "0x1F", "~", "null", "2024-01-01", "1.0", "données"]
    assert config.data.mixture == [{"weight": 2, "paths": ["1_0", "x"]}]
    assert (config.logger.wandb.project, config.logger.wandb.group) == ("no", None)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_a_runs_config_file(text, tmp_path):
    config = load([f"run.name={quoted(text)}", f"data.paths=[{quoted(text)}]"])
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    stored = flat(read_config(file))
    assert (stored["run.name"], stored["data.paths"]) == (text, [text])


def test_each_value_of_a_sweep_is_text():
    jobs = combinations(parse(["data.tokenizer=007,é (1),null", "data.paths=[a,1_0],b c", "optim.rank=4"]))
    configs = [load(job) for job in jobs]
    assert [config.data.tokenizer for config in configs] == ["007", "007", "é (1)", "é (1)", None, None]
    assert [config.data.paths for config in configs[:2]] == [["a", "1_0"], ["b c"]]
    choices = combinations(parse(["logger.wandb.group=choice(1_0, 2e3)"]))
    assert [load(job).logger.wandb.group for job in choices] == ["1_0", "2e3"]


def test_a_sweeps_name_is_its_folder_as_it_was_typed(tmp_path):
    overrides, logs = begin(["run.name=2024_111", f"run.root={tmp_path}", "train.seed=0,1"])
    assert logs.parent == tmp_path / "2024_111" / "_sweeps" and 'run.name="2024_111"' in overrides
    assert json.loads((logs / "fixed.json").read_text())
    assert job_name(['data.tokenizer="007"']) == job_name(["data.tokenizer=007"]) == "tokenizer-007"


def test_what_was_typed_stays_when_it_is_typed_again():
    once = as_typed([f"run.name={text}" for text in SAMPLES])
    assert as_typed(once) == once


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train.steps", "100"], "train.steps: settings are given as key=value; write train.steps=100"),
        (["--steps", "100"], "--steps: settings are given as key=value; write train.steps=100"),
        (["--train.steps=100"], "write train.steps=100"),
        (["--seq-len", "64"], "write train.seq_len=64"),
        (["--rank=8"], "write optim.rank=8"),
        (["-n", "3"], "-n: settings are given as key=value, such as train.steps=1000"),
        (["help"], "help: settings are given as key=value, such as train.steps=1000"),
        (["run.name=My", "Corpus"], "Corpus: settings are given as key=value; quote a value with spaces: "
         "'run.name=My Corpus'"),
        (["train.step", "5"], "write train.steps=5"),
        (["--config-name", "x"], "--config-name: settings are given as key=value"),
    ],
)  # fmt: skip
def test_flags_and_values_without_a_key_are_answered_with_the_form_to_type(root, arguments, advice):
    command = [sys.executable, "-m", "pretrain.train", *arguments]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "") and advice in result.stderr
