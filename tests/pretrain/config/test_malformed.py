"""Settings and files of a run that hold anything at all: one clear error, or none, and never another."""

import json
import string
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pretrain.checkpoint.directory import MANIFEST, STATE, checksum, newest_good, path_of, read_state, seal
from pretrain.checkpoint.manager import read_rollbacks
from pretrain.config.compose import keys, load
from pretrain.config.schema import ConfigError, RunConfig
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check

BASE = ["data=text", "data.paths=[models]"]
CONFIG = load(BASE)
KEYS = keys(OmegaConf.structured(CONFIG))
TEXT = st.text(string.printable, max_size=12)
NUMBERS = st.one_of(st.integers(-(10**12), 10**12), st.floats(), st.booleans(), st.none())
VALUES = st.one_of(TEXT, NUMBERS.map(str), st.lists(NUMBERS, max_size=3).map(str), st.just("{}"), st.just("???"))
JSON = st.recursive(
    st.one_of(NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
)
ANYTHING = st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()))
SEVERAL = settings(max_examples=170, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def take_or_refuse(key, value):
    try:
        check(load([*BASE, f"{key}={value}"]), needs_data=False)
    except ConfigError as error:
        assert str(error).strip()


ANY_OVERRIDE = given(key=st.one_of(st.sampled_from(KEYS), TEXT), value=VALUES)


@settings(max_examples=12, deadline=None)
@ANY_OVERRIDE
@example(key="optim.rank", value="{*:0}")
@example(key="optim.betas", value="[x, 0.9]")
@example(key="train.steps", value="1e400")
@example(key="+", value="")
def test_any_override_is_taken_or_refused_in_words(key, value):
    take_or_refuse(key, value)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@ANY_OVERRIDE
def test_two_hundred_overrides_are_taken_or_refused_in_words(key, value):
    take_or_refuse(key, value)


@pytest.fixture
def kept(tmp_path):
    """The folder of a run with one small checkpoint."""
    path = path_of(tmp_path / "kept" / "checkpoints", 2)
    path.mkdir(parents=True)
    save_file({"model.x": torch.ones(2)}, path / "shard.safetensors")
    state = {"step": 2, "seconds": 1.0, "training_seconds": 1.0, "data": {}}
    seal(path, state, {"shard.safetensors": checksum(path / "shard.safetensors")})
    (tmp_path / "kept" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(CONFIG)))
    return tmp_path / "kept"


@SEVERAL
@given(name=st.sampled_from([STATE, MANIFEST]), content=ANYTHING)
@example(name=STATE, content=b'{"format": 1}')
@example(name=MANIFEST, content=b'{"format": 2, "files": {"state.json": []}}')
@example(name=MANIFEST, content=b"[" * 100_000)
def test_anything_in_the_json_of_a_checkpoint_is_refused(kept, name, content):
    path = path_of(kept / "checkpoints", 2)
    before = {file: (path / file).read_bytes() for file in (STATE, MANIFEST)}
    (path / name).write_bytes(content)
    try:
        with pytest.raises(ValueError, match="00000002"):
            newest_good(kept / "checkpoints")
            read_state(path)
    finally:
        for file, content in before.items():
            (path / file).write_bytes(content)


@SEVERAL
@given(name=st.sampled_from(["config.yaml", "rollbacks.json"]), content=ANYTHING)
@example(name="config.yaml", content=b"a: ${b}")
@example(name="config.yaml", content=b"train: [1]\nmodel: 3\n1: 2\n")
@example(name="rollbacks.json", content=b'{"steps": 3}')
def test_anything_in_the_files_of_a_run_is_refused_or_read(kept, name, content):
    config = replace(CONFIG, run=RunConfig(name="kept", root=str(kept.parent)))
    folder = RunFolder(config)
    before = folder.config_file.read_bytes()
    (kept / name).write_bytes(content)
    try:
        if name == "config.yaml":
            folder.check(config)  # an empty file or one of other keys differs in nothing that both have
        else:
            assert all(isinstance(step, int) for step in read_rollbacks(folder.rollbacks_file))
    except ConfigError as error:
        assert str(kept) in str(error)
    finally:
        folder.config_file.write_bytes(before)
        folder.rollbacks_file.unlink(missing_ok=True)
