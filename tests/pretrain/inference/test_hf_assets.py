"""Every end of a model stops its texts, and the files beside its weights come out of an export as they went in.

transformers' own reading is the oracle for both.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import Tokenizer
from pretrain.config.compose import load
from pretrain.inference.hf_export import export
from pretrain.inference.hf_tokenizer import tokenizer_json
from pretrain.inference.pretrained import find_pretrained
from pretrain.inference.sampling import Sampling
from pretrain.inference.text_generator import TextGenerator
from tests.pretrain.inference.hf_models import byte_level, change_json, llama, sentencepiece, write_json
from tests.pretrain.inference.test_padded_vocabulary import overrides, train

BEGIN, END, TURN, PAD = 300, 301, 302, 303  # the special tokens of byte_level(tokens=300)
NAMES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"


def model_that_writes(folder, token, **config):
    """A byte-level model that writes ``token``, and nothing else."""
    byte_level(folder)
    model = llama(folder, 304, bos_token_id=BEGIN, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")) else 1.0)
        model.lm_head.weight[token] = 1.0
    model.save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **NAMES)


# eos_token_id in config.json and in generation_config.json; ... for no such key, None for no such file.
ENDS = {
    "a number in both": (END, END),
    "a list in both": ([END, TURN], [END, TURN]),
    "a list of one": ([TURN], [TURN]),
    "two orders": ([TURN, END], [END, TURN]),
    "more in the generation settings": (END, [END, TURN]),
    "fewer in the generation settings": ([END, TURN], END),
    "other ones in the generation settings": (PAD, TURN),
    "an ordinary token": ([END, 65], [END, 65]),
    "only in config.json": ([END, TURN], None),
    "a number, only in config.json": (TURN, None),
    "not in the generation settings": ([END, TURN], ...),
    "twice the same": ([END, END], [TURN, TURN]),
    "an id beyond the rows": ([END, 9999], [END, 9999]),
    "null": (None, None),
}


@pytest.mark.parametrize(("in_config", "in_generation"), ENDS.values(), ids=ENDS)
def test_a_text_ends_where_transformers_ends_it(in_config, in_generation, tmp_path):
    model_that_writes(tmp_path, END)
    change_json(tmp_path / "config.json", eos_token_id=in_config)
    if in_generation is None:
        (tmp_path / "generation_config.json").unlink()
    else:
        change_json(tmp_path / "generation_config.json", eos_token_id=in_generation)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    stated = theirs.generation_config.eos_token_id
    found = find_pretrained(tmp_path)
    ends = {*found.end_ids()}
    if not (in_config is None and in_generation is None):
        assert ends == {*(stated if isinstance(stated, list) else [] if stated is None else [stated])}
    _, tokenizer = found.load()
    prompt = [BEGIN, *tokenizer.encode("alpha")]
    for token in (END, TURN, PAD, 65):
        (tmp_path / "other").mkdir(exist_ok=True)
        model_that_writes(tmp_path / "other", token)
        writes = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        generated = writes.generate(
            torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=sorted(ends | {tokenizer.eos_id})
        )
        generator = TextGenerator(find_pretrained(tmp_path / "other").load()[0], tokenizer, found.end_ids())
        list(generator.stream("alpha", 5, Sampling(temperature=0)))
        assert generator.tokens == generated.shape[1] - len(prompt) == (1 if token in ends | {END} else 5)


@pytest.mark.parametrize("eos", ["</s>", "2", 2.0, True, [301, None], [[301]], {"id": 301}])
def test_ends_that_are_no_ids_are_named_with_their_file(eos, tmp_path):
    model_that_writes(tmp_path, END)
    change_json(tmp_path / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* is neither a token id"):
        find_pretrained(tmp_path).end_ids()


WITH_FLAGS = {"__type": "AddedToken", "content": "<|end|>", "special": True} | dict.fromkeys(
    ("lstrip", "normalized", "rstrip", "single_word"), False
)
# What the files beside a tokenizer.json say, by file; the id of eos is read from them.
EOS_BESIDE = {
    "its config": {"tokenizer_config.json": {"eos_token": "<|end|>"}},
    "its config, with settings": {"tokenizer_config.json": {"eos_token": WITH_FLAGS}},
    "the map of special tokens": {"special_tokens_map.json": {"eos_token": "<|end|>"}},
    "the map, with settings": {"special_tokens_map.json": {"eos_token": {"content": "<|end|>", "lstrip": False}}},
    "a config without it, and the map": {
        "tokenizer_config.json": {"bos_token": "<|begin|>"}, "special_tokens_map.json": {"eos_token": "<|end|>"},
    },
    "both, which differ": {
        "tokenizer_config.json": {"eos_token": "<|end|>"}, "special_tokens_map.json": {"eos_token": "<|turn|>"},
    },
    "a null, and the map": {
        "tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<|end|>"},
    },
    "the model's settings": {"config.json": {"eos_token_id": END}},
    "a list in the model's settings": {"config.json": {"eos_token_id": [END, TURN]}},
    "the generation settings": {"generation_config.json": {"eos_token_id": END}},
    "a list in the generation settings": {"generation_config.json": {"eos_token_id": [END, TURN]}},
    "both settings": {"generation_config.json": {"eos_token_id": END}, "config.json": {"eos_token_id": TURN}},
}  # fmt: skip


@pytest.mark.parametrize("files", EOS_BESIDE.values(), ids=EOS_BESIDE)
def test_the_end_of_a_tokenizer_is_found_in_every_file_that_can_name_it(files, tmp_path):
    file = byte_level(tmp_path)
    for name, content in files.items():
        write_json(tmp_path / name, **content)
    tokenizer = Tokenizer(file)
    assert tokenizer.eos_id == END
    (tmp_path / "copy").mkdir()
    assert Tokenizer(tokenizer.copy_to(tmp_path / "copy")).eos_id == END
    if {*files} <= {"tokenizer_config.json"}:
        change_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == END


def chat_model(folder):
    """As Llama 3's: two ends, generation settings, a template in the tokenizer's settings."""
    model_that_writes(folder, END, eos_token_id=[END, TURN])
    change_json(folder / "generation_config.json", eos_token_id=[END, TURN], temperature=0.6, do_sample=True, top_p=0.9)
    change_json(folder / "tokenizer_config.json", chat_template=TEMPLATE, pad_token="<|pad|>", model_max_length=128)
    change_json(folder / "config.json", attention_dropout=0.1, pretraining_tp=2, pad_token_id=PAD, use_cache=False)


def with_files_of_templates(folder):
    """As transformers 5 writes them: templates in files of their own."""
    chat_model(folder)
    change_json(folder / "tokenizer_config.json", chat_template=...)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool" + TEMPLATE)


def with_old_files(folder):
    """As transformers 4 wrote them."""
    chat_model(folder)
    change_json(folder / "tokenizer_config.json", chat_template=..., pad_token=...)
    write_json(folder / "chat_template.json", chat_template=TEMPLATE)
    write_json(folder / "special_tokens_map.json", pad_token="<|pad|>", additional_special_tokens=["<|turn|>"], **NAMES)
    write_json(folder / "added_tokens.json", **{"<|turn|>": TURN})


def with_a_padding_id(folder):
    """As LLaMA 2's: a sentencepiece model, and ids in config.json."""
    sentencepiece(folder)
    llama(folder, 320, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    write_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True, eos_token="</s>")


def with_both_tokenizers(folder):
    """As many conversions are: the same tokenizer in two forms."""
    with_a_padding_id(folder)
    write_json(folder / "tokenizer.json", **tokenizer_json(folder / "tokenizer.model"))


def with_no_generation_settings(folder):
    """As models of years ago are: the ends are in config.json."""
    chat_model(folder)
    (folder / "generation_config.json").unlink()


def with_no_settings_of_a_tokenizer(folder):
    """A bare tokenizer.model beside the weights."""
    sentencepiece(folder)
    llama(folder, 300, eos_token_id=2, bos_token_id=1)


BROUGHT = [
    chat_model, with_files_of_templates, with_old_files, with_a_padding_id, with_both_tokenizers,
    with_no_generation_settings, with_no_settings_of_a_tokenizer,
]  # fmt: skip
CHAT = [{"role": "me", "content": "x"}]
OWN = ("config.json", "model.safetensors")  # which an export writes itself


def files_in(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name not in OWN}


@pytest.mark.parametrize("kind", BROUGHT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("through_a_run", [False, True])
def test_the_files_of_a_model_come_out_of_an_export_as_they_were(kind, through_a_run, tmp_path):
    (folder := tmp_path / "hf").mkdir()
    kind(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    before, model, source = files_in(folder), AutoModelForCausalLM.from_pretrained(folder), folder
    theirs = template = None
    if (folder / "tokenizer_config.json").exists():
        theirs = AutoTokenizer.from_pretrained(folder)
        template = theirs.chat_template and theirs.apply_chat_template(CHAT, tokenize=False)
    if through_a_run:
        source = train(load(overrides(tmp_path, folder, f"model.vocab_size={rows}")))
        shutil.rmtree(folder)  # the run has all of it
    export(source, tmp_path / "out")
    after = files_in(tmp_path / "out")
    assert before.items() <= after.items()
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    if theirs:
        assert ours("alpha beta 7").input_ids == theirs("alpha beta 7").input_ids
        assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    if template:
        assert ours.apply_chat_template(CHAT, tokenize=False) == template
    assert {*find_pretrained(tmp_path / "out").end_ids()} == {*find_pretrained(source).end_ids()}


def test_a_run_from_a_run_and_from_a_single_file_keeps_the_ends_as_well(tmp_path):
    (folder := tmp_path / "hf").mkdir()
    chat_model(folder)
    first = train(load(overrides(tmp_path, folder, "model.vocab_size=304")))
    for name, start in (("second", first), ("third", folder / "model.safetensors")):
        common = overrides(tmp_path, folder, "model.vocab_size=304", f"run.name={name}")
        run = train(load([*common, f"train.init_from={start}"]))
        assert find_pretrained(run).end_ids() == [END, TURN]
        assert (run / "hf_assets" / "tokenizer_config.json").exists()


def test_samples_stop_at_each_of_the_ends(tmp_path):
    (folder := tmp_path / "hf").mkdir()
    model_that_writes(folder, TURN, eos_token_id=[END, TURN])
    quiet = ["optim.lr=1e-9", "optim.linear_lr=1e-9"]
    run = train(load(overrides(tmp_path, folder, "model.vocab_size=304", "train.sample_tokens=50", *quiet)))
    assert "The" in (run / "samples.md").read_text()
    assert (run / "samples.md").read_text().count("````text\nThe\n````") == 1
