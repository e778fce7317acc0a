"""Where an LLM is looked for, that its folder runs no code, and a tokenizer that does not fit its model."""

import ast
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer
from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import load_llm, load_saved_shape, save_shape
from trainer.runs.load import load_run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a Hub at a port where nobody listens; whoever waits to ask it again fails."""
    from huggingface_hub import close_session, constants, hf_api

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the next one reads the environment
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:1")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("asked again"))
    return tmp_path / "cache"


def test_an_llm_in_no_cache_is_an_error_at_once_where_the_hub_does_not_answer(hub):
    message = r"'acme/llm' cannot be loaded: it is not in the Hub's cache, .* not answer \(.*refused\); .*--llm FOLDER"
    with pytest.raises(UserError, match=message):
        load_llm("acme/llm")


def test_offline_mode_is_named_where_it_keeps_an_llm_away(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the Hub's cache.*HF_HUB_OFFLINE"):
        load_llm("acme/llm")


def test_an_llm_in_the_cache_needs_no_hub(hub, pretrained):
    """The cache's real layout, made by hand: a reference to a commit, a snapshot of its files."""
    repository = hub / "models--acme--llm"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    (repository / "snapshots" / ("c" * 40)).symlink_to(pretrained)
    expected, found = load_llm(pretrained), load_llm("acme/llm")
    assert found.model.state_dict().keys() == expected.model.state_dict().keys()
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def bring_code(folder, file, key, made):
    """Let a file of the folder name Python code in it, which leaves a mark where it is run."""
    settings = json.loads((folder / file).read_text()) | {"auto_map": {key: "own.Own"}}
    if file == "config.json":
        settings["model_type"] = "own"
    (folder / file).write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(made)!r}, 'w').close()\n")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("config.json", "AutoModelForCausalLM"),
    ],
)
def test_code_in_the_folder_of_an_llm_is_neither_run_nor_offered(pretrained, tmp_path, monkeypatch, file, key):
    llm = load_llm(pretrained)
    bring_code(Path(pretrained), file, key, tmp_path / "made")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    if file == "config.json":
        with pytest.raises(UserError, match="cannot be loaded") as refused:
            load_llm(pretrained)
        assert "trust_remote_code" not in str(refused.value)
        with pytest.raises(UserError, match="cannot be read"):
            load_saved_shape(Path(pretrained))
    else:
        assert load_llm(pretrained).tokenizer.get_vocab() == llm.tokenizer.get_vocab()
    assert not (tmp_path / "made").exists()


def test_every_class_that_is_chosen_by_a_folder_is_told_to_run_no_code_of_it():
    root, silent = Path(trainer.__file__).parents[1], []
    files = [
        file for folder in ("trainer", "pipeline", "scripts", "benchmarks") for file in (root / folder).rglob("*.py")
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).rpartition(".")[2]
                if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                    values = {word.arg: word.value for word in node.keywords}
                    if ast.unparse(values.get("trust_remote_code", ast.Constant(None))) != "False":
                        silent.append(f"{file.relative_to(root)}:{node.lineno}")
    assert silent == []


def with_words(folder, *words, special=False):
    """Add words to the tokenizer of an LLM, and no rows to its embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(words), special_tokens=special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def answering(sample, answer):
    return replace(sample, turns=(sample.turns[0], Turn(role="gpt", text=answer)))


@pytest.fixture
def on_pretrained(config, pretrained):
    return replace(config, llm=pretrained, train_llm="none")


@pytest.mark.parametrize("where", ["an answer", "a question", "a held-out sample", "an option"])
def test_a_word_without_an_embedding_is_refused_before_the_first_step(on_pretrained, samples, tokens, where):
    tokenizer = with_words(on_pretrained.llm, "zebra")
    if where == "an answer":
        samples[7] = answering(samples[7], "red zebra")
    elif where == "a question":
        samples[7] = replace(samples[7], turns=(Turn(role="human", text="a zebra?"), samples[7].turns[1]))
    elif where == "a held-out sample":
        samples[7] = replace(answering(samples[7], "zebra"), split="heldout")
    else:
        samples[7] = replace(samples[7], options=("zebra", *samples[7].options[1:]))
    rows = len(tokenizer) - 1
    message = (
        rf"sample 's007' .* has {rows + 1} tokens .* {rows} embeddings, none for 'zebra' \({rows}\); .*resize_token"
    )
    with pytest.raises(UserError, match=message):
        make_plan(on_pretrained, samples, tokens)


def test_a_word_of_the_template_without_an_embedding_is_refused(on_pretrained, samples, tokens):
    tokenizer = with_words(on_pretrained.llm, "<|user|>", special=True)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(on_pretrained.llm)
    make_plan(on_pretrained, samples, tokens)  # the pure prompt never writes it
    with pytest.raises(UserError, match=r"none for '<\|user\|>'"):
        make_plan(replace(on_pretrained, prompt="chat_template"), samples, tokens)


def test_added_words_that_no_text_holds_do_no_harm_and_are_refused_in_a_question(on_pretrained, samples, tokens):
    with_words(on_pretrained.llm, "zebra", "<pad>")
    built = make_plan(on_pretrained, samples, tokens).built
    with pytest.raises(UserError, match="a text cannot be read by the LLM"):
        built.renderer.question((Turn(role="human", text="Is it a zebra?"), Turn(role="gpt", text="")))


def test_words_of_another_model_and_roles_without_an_embedding_are_refused_at_once(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(pretrained)
    with pytest.raises(UserError, match=rf"{rows} embeddings, none for '<\|end\|>'"):
        load_llm(pretrained)
    model.resize_token_embeddings(rows - 2)
    model.save_pretrained(pretrained)
    with pytest.raises(UserError, match=rf"{rows - 2} embeddings, none for '.*' \({rows - 2}\)"):
        load_llm(pretrained)


def test_embeddings_beyond_the_tokenizer_are_padding(on_pretrained, samples, tokens):
    model = AutoModelForCausalLM.from_pretrained(on_pretrained.llm)
    model.resize_token_embeddings(64)
    model.save_pretrained(on_pretrained.llm)
    assert make_plan(on_pretrained, samples, tokens).built.llm.model.get_input_embeddings().weight.shape[0] == 64


def test_the_end_tokens_of_a_generation_are_those_of_the_llm_also_where_only_its_shape_is_kept(
    pretrained, tmp_path, config, samples, tokens
):
    from trainer.loop.train import train

    llm = load_llm(pretrained)
    llm.model.generation_config.eos_token_id = [2, 5]
    llm.model.save_pretrained(pretrained)
    llm.model.generation_config.temperature = 0.9  # of sampling, which is off: transformers refuses to save it
    save_shape(llm, tmp_path / "shape", with_sizes=True)
    assert load_saved_shape(tmp_path / "shape").model.generation_config.eos_token_id == [2, 5]
    train(replace(config, llm=pretrained, max_steps=1), samples, tokens, tmp_path / "run", quiet=True)
    assert load_run(tmp_path / "run").built.renderer.end_ids == (2, 5)


def test_the_implementation_of_attention_is_a_setting(config, samples, tokens, pretrained, tmp_path):
    losses = {}
    for name in ("eager", "sdpa"):
        settings = replace(config, llm=pretrained, train_llm="lora", attn_implementation=name, max_steps=2)
        built = make_plan(settings, samples, tokens).built
        assert built.model.llm.config._attn_implementation == name
        losses[name] = train(settings, samples, tokens, tmp_path / name, quiet=True).loss
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-5)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
@pytest.mark.parametrize("llm", ["fresh:mini", "pretrained"])
def test_an_implementation_that_is_not_installed_is_named(llm, pretrained):
    with pytest.raises(UserError, match=r"attn_implementation flash_attention_2: .*leave it out"):
        load_llm(pretrained if llm == "pretrained" else llm, texts=["a"], attention="flash_attention_2")


def test_weights_are_read_straight_onto_their_device(pretrained):
    llm = load_llm(pretrained, device=torch.device("meta"))
    assert {parameter.device.type for parameter in llm.model.parameters()} == {"meta"}
