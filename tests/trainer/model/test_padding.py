"""Right padding with and without an attention mask, on small architectures of transformers with random weights."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from trainer.model.padding import has_plain_head, settle_padding, without_mask

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # of 0.02 attention is next to uniform, whatever the positions
}
LENGTHS = (14, 11, 9, 6)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 64, **changes}))


def rotary(kind, **parameters):
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 8}
    sizes = {**SIZES, "max_position_embeddings": 64, "original_max_position_embeddings": 8}
    return Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rotary("longrope", **factors)))


def dynamic():
    return llama(max_position_embeddings=8, rope_parameters=rotary("dynamic", factor=4.0))


LLMS = {
    "llama": llama,
    "llama with fewer key heads": lambda: llama(num_key_value_heads=2),
    "llama, eager attention": lambda: llama(attn_implementation="eager"),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mistral with a window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5, max_position_embeddings=64)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=5, max_position_embeddings=64)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)),
}


def made(make, dtype=torch.float32):
    torch.manual_seed(3)
    return make().to(dtype).eval()


def prefix_lm(**changes):
    """A LLaMA whose positions all read each other, as those of a prefix do in a prefix LM."""
    return llama(is_causal=False, **changes)


def even_prefix_lm():
    """The same with next to uniform attention: later positions hardly matter."""
    return prefix_lm(initializer_range=0.02)


def bert():
    return BertLMHeadModel(BertConfig(**SIZES, max_position_embeddings=64, is_decoder=False))


def padded_batch(llm):
    """embeddings_BSM that are zero behind LENGTHS, and their mask_BS."""
    random = torch.Generator().manual_seed(4)
    mask_BS = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    width = llm.get_input_embeddings().weight.shape[1]
    values = torch.randn(*mask_BS.shape, width, generator=random) * mask_BS[..., None]
    return values.to(llm.get_input_embeddings().weight.dtype).requires_grad_(), mask_BS


def loss_and_gradient(llm, embeddings_BSM, mask_BS, attention_mask):
    logits_BSV = llm(inputs_embeds=embeddings_BSM, attention_mask=attention_mask, use_cache=False).logits
    loss = (logits_BSV.float() * mask_BS[..., None]).square().sum()
    gradient_BSM = torch.autograd.grad(loss, embeddings_BSM)[0].float()
    return loss, gradient_BSM * mask_BS[..., None]


@pytest.mark.parametrize("name", LLMS)
def test_a_causal_llm_has_the_same_loss_and_gradient_without_a_mask(name):
    llm = made(LLMS[name])
    assert without_mask(llm)
    embeddings_BSM, mask_BS = padded_batch(llm)
    loss, gradient_BSM = loss_and_gradient(llm, embeddings_BSM, mask_BS, mask_BS)
    plain_loss, plain_gradient_BSM = loss_and_gradient(llm, embeddings_BSM, mask_BS, None)
    torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=0)
    assert (plain_gradient_BSM - gradient_BSM).abs().max() <= 1e-5 * gradient_BSM.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, eager attention"])
def test_with_as_many_key_heads_as_query_heads_it_is_equal_to_the_bit(name):
    llm = made(LLMS[name])
    embeddings_BSM, mask_BS = padded_batch(llm)
    with_mask = loss_and_gradient(llm, embeddings_BSM, mask_BS, mask_BS)
    without = loss_and_gradient(llm, embeddings_BSM, mask_BS, None)
    assert all(torch.equal(one, other) for one, other in zip(with_mask, without, strict=True))


def test_in_bf16_it_is_within_the_precision_of_the_numbers():
    llm = made(LLMS["llama with fewer key heads"], torch.bfloat16)
    assert without_mask(llm)
    embeddings_BSM, mask_BS = padded_batch(llm)
    loss, _ = loss_and_gradient(llm, embeddings_BSM, mask_BS, mask_BS)
    plain_loss, _ = loss_and_gradient(llm, embeddings_BSM, mask_BS, None)
    torch.testing.assert_close(plain_loss, loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [prefix_lm, even_prefix_lm, bert])
def test_an_llm_that_reads_later_positions_keeps_its_mask(make, dtype):
    padding = settle_padding(made(make, dtype), longest=20)
    assert padding.keeps_mask
    assert padding.reason


def test_a_window_within_reach_keeps_the_mask_of_the_whole_run():
    llm = made(LLMS["mistral with a window"])
    assert not settle_padding(llm, longest=4).keeps_mask
    assert "sliding_window of 5" in settle_padding(llm, longest=5).reason


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_rescaled_positions_are_those_of_the_longest_sequence_whatever_the_batch(make):
    def alone(llm, embeddings_BSM):
        with torch.no_grad():
            return llm(inputs_embeds=embeddings_BSM, use_cache=False).logits

    torch.manual_seed(5)
    short_BSM, long_BSM = torch.randn(1, 6, 32), torch.randn(1, 20, 32)
    llm = made(make)
    unpinned = copy.deepcopy(llm)
    assert settle_padding(llm, longest=20).rotary_length == 20
    # transformers itself computes them for the longest position of the batch.
    torch.testing.assert_close(alone(llm, long_BSM), alone(unpinned, long_BSM))
    padded_BSM = torch.cat([short_BSM, torch.zeros(1, 14, 32)], dim=1)
    torch.testing.assert_close(alone(llm, short_BSM), alone(llm, padded_BSM)[:, :6])
    short, padded = alone(unpinned, short_BSM), alone(unpinned, padded_BSM)[:, :6]
    assert (short - padded).abs().max() > 1e-3  # of an LLM as it is loaded they depend on the padding


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_a_run_of_short_sequences_keeps_unscaled_positions(make):
    llm = made(make)
    frequencies = llm.model.rotary_emb.inv_freq.clone()
    settle_padding(llm, longest=20)  # of another run that shared the LLM
    assert not torch.equal(llm.model.rotary_emb.inv_freq, frequencies)
    assert settle_padding(llm, longest=7).rotary_length == 7
    assert torch.equal(llm.model.rotary_emb.inv_freq, frequencies)


def test_an_llm_without_rescaled_positions_pins_none():
    assert settle_padding(made(llama), longest=20).rotary_length is None


def test_measuring_leaves_modes_and_random_numbers_alone():
    llm = made(lambda: llama(attention_dropout=0.5)).train()
    llm.model.layers[0].eval()
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    settle_padding(llm, longest=20)
    has_plain_head(llm)
    assert torch.equal(torch.rand(3), expected)
    assert llm.training
    assert not llm.model.layers[0].self_attn.training


def test_capped_logits_are_no_plain_head():
    assert has_plain_head(made(llama))
    assert has_plain_head(made(LLMS["gpt2"]))
    assert not has_plain_head(made(LLMS["gemma2"]))  # its logits are capped
