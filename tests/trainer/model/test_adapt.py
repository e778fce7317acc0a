from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mervcache.errors import UserError
from trainer.config import LoraConfig, TrainConfig
from trainer.loop.optimizer import build_optimizer, current_rates, set_rates
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import add_adapters, checkpoint_layers, decoder_layers, load_llm, quantised_loading
from trainer.runs import checkpoint
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.runs.weight_names import to_model_names

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def lora(config, pretrained):
    """A run with adapters in an LLM that is held in bfloat16."""
    return replace(config, llm=pretrained, train_llm="lora", precision="bf16", lora=LoraConfig(rank=2, dropout=0.1))


@pytest.fixture
def llm():
    torch.manual_seed(0)
    return load_llm("fresh:mini", texts=["a b c"]).model


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def test_adapters_are_in_all_linear_layers_but_the_last_and_alone_are_trained(lora, samples, tokens):
    model = make_plan(lora, samples, tokens).built.model.llm
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    layers = [f"model.layers.{index}" for index in (0, 1)]
    parts = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LINEAR}
    assert adapted == {f"{layer}.{parts[name]}.{name}" for layer in layers for name in LINEAR}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


def test_adapters_begin_as_nothing_and_then_add_their_product(llm):
    ids = torch.tensor([[1, 3, 4]])
    before = llm(ids).logits
    add_adapters(llm, LoraConfig(rank=2, alpha=6.0, dropout=0.0, targets=("q_proj",)))
    assert torch.equal(llm(ids).logits, before)
    layer, x = llm.model.layers[0].self_attn.q_proj, torch.randn(5, 32)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    added = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * (6.0 / 2)
    assert torch.allclose(layer(x), x @ layer.base_layer.weight.T + added, atol=1e-5)


def test_under_autocast_adapters_are_cast_and_activations_are_not():
    """Against the low-rank product in fp32: 16-bit rounding of inputs and weights, 2^-8 each."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)})
    add_adapters(model, LoraConfig(rank=4, alpha=8.0, dropout=0.0))
    layer, x = model["layer"], torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    kept = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value),
    ):
        found = layer(x)
    wanted = x.detach().float() @ (layer.base_layer.weight.float().T + a.T @ b.T * 2.0)
    assert torch.allclose(found.float(), wanted, atol=0.02 * wanted.abs().max().item())
    assert {value.dtype for value in kept} == {torch.bfloat16}
    found.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_a_target_that_is_no_layer_lists_those_that_are(llm):
    with pytest.raises(UserError, match=r"linear layer in lora.targets 'q_prj', the nearest known one is 'q_proj'"):
        add_adapters(llm, LoraConfig(targets=("q_prj",)))


def test_adapters_have_their_own_rate(lora, samples, tokens):
    settings = replace(lora.optimizer, lora_lr=0.5, llm_lr=0.25, warmup_ratio=0.0)
    optimizer = build_optimizer(make_plan(lora, samples, tokens).built.model, settings)
    set_rates(optimizer, 0, 10, settings)
    assert current_rates(optimizer) == {"lora_lr": 0.5, "projector_lr": 3e-3, "fusion_lr": 3e-3}


def test_a_checkpoint_holds_adapters_and_visual_path_and_gives_the_model_back(tmp_path, lora, samples, tokens):
    lora = replace(lora, optimizer=replace(lora.optimizer, lora_lr=1e-2))
    plan = make_plan(lora, samples, tokens)
    train(lora, samples, tokens, tmp_path / "run", quiet=True)
    held = load_file(checkpoint.newest(tmp_path / "run") / checkpoint.MODEL_FILE)
    of_llm = {name for name in held if name.startswith("llm.")}
    assert len(of_llm) == 2 * 2 * len(LINEAR)  # A and B in each of two layers
    assert all(".lora_" in name and held[name].dtype == torch.float32 for name in of_llm)
    assert all(held[name].any() for name in of_llm)  # B was zero before the first step
    found = load_run(tmp_path / "run").built.model
    assert not found.training
    held = to_model_names(held, found.encoders)
    before, after = plan.built.model.state_dict(), found.state_dict()
    for name, value in after.items():
        assert torch.equal(value, held.get(name, before[name])), name


def test_a_stopped_run_with_adapters_and_dropout_has_the_same_losses_to_the_bit(tmp_path, lora, samples, tokens):
    train(lora, samples, tokens, tmp_path / "whole", quiet=True)
    train(lora, samples, tokens, tmp_path / "parts", stop_at=3, quiet=True)
    train(lora, samples, tokens, tmp_path / "parts", resume=True, quiet=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "whole")[-1]


@pytest.mark.parametrize("train_llm", ["none", "lora", "full"])
def test_activation_checkpointing_computes_each_layer_again_and_changes_no_gradient(
    config, pretrained, samples, tokens, train_llm
):
    def gradients(is_on):
        settings = replace(config, llm=pretrained, train_llm=train_llm, activation_checkpointing=is_on)
        plan = make_plan(settings, samples, tokens)
        counts = []
        for layer in decoder_layers(plan.built.model.llm):
            layer.input_layernorm.register_forward_pre_hook(lambda *_: counts.append(1))
        plan.built.model.train()
        torch.manual_seed(5)  # of dropout in the adapters
        loss = plan.built.model(plan.batches.step(0).micro_batches[0])
        forwards = len(counts)
        loss.backward()
        found = {name: p.grad for name, p in plan.built.model.named_parameters() if p.grad is not None}
        return loss, found, forwards, len(counts) - forwards

    plain, kept, forwards, again = gradients(False)
    assert (forwards, again) == (2, 0)
    loss, found, forwards, again = gradients(True)
    assert (forwards, again) == (2, 2)
    assert torch.equal(loss, plain)
    assert set(found) == set(kept)
    for name in kept:
        assert torch.allclose(found[name], kept[name], atol=1e-6), name


def test_layers_are_not_computed_again_without_gradients(llm):
    checkpoint_layers(llm)
    with torch.no_grad():
        assert llm.generate(torch.tensor([[1, 3]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_checkpointing_of_an_llm_that_serves_several_runs_is_switched_not_added(llm):
    layer = decoder_layers(llm)[0]
    plain = layer.forward
    checkpoint_layers(llm)
    once = layer.forward
    checkpoint_layers(llm)
    assert layer.forward is once
    checkpoint_layers(llm, is_on=False)
    assert layer.forward == plain


def test_an_llm_without_layers_to_checkpoint_is_refused():
    with pytest.raises(UserError, match="Linear names no layers"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_quantisation_says_what_it_needs(monkeypatch):
    with pytest.raises(UserError, match=r"unknown llm_quant 'int3', .*known: int8, nf4"):
        quantised_loading("int3")
    monkeypatch.setattr("trainer.model.llm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'merv-pipeline\[quant\]' \(untested"):
        quantised_loading("nf4")
    monkeypatch.setattr("trainer.model.llm.find_spec", lambda name: True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA device and none is visible"):
            quantised_loading("nf4")


@pytest.mark.parametrize("changes", [{"train_llm": "full"}, {"llm": "fresh:tiny", "allow_fresh_frozen": True}])
def test_only_a_pretrained_llm_that_is_not_trained_is_quantised(changes):
    with pytest.raises(UserError, match="llm_quant nf4 is for a pretrained LLM that is not trained itself"):
        TrainConfig(**{"llm": "somebody/llm", "llm_quant": "nf4", **changes})


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_odd_adapters_are_refused(values):
    with pytest.raises(UserError, match="lora wants rank >= 1"):
        LoraConfig(**values)
