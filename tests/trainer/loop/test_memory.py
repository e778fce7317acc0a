"""The memory estimate against what autograd really keeps, and settings that fit a device."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from mervcache.errors import UserError
from trainer.data.tokens import MemoryTokens
from trainer.loop.memory import Device, measure, memory_by_part, planned_device
from trainer.loop.plan import describe, make_plan
from trainer.model.llm import word_tokenizer

WIDTH, FEEDFORWARD = 128, 344  # as LLaMA-2-7B's 4,096 and 11,008
LAYERS = 4
GB = 10**9


@pytest.fixture
def llama(tmp_path, samples):
    """A folder with a Llama of LLaMA-2's proportions."""
    torch.manual_seed(1)
    tokenizer = word_tokenizer([turn.text for sample in samples for turn in sample.turns])
    sizes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEEDFORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.fixture
def wide(config, llama):
    """Many visual tokens, so that the layers cost most, in bf16 like the large recipes."""
    projector = replace(config.projector, grid=(4, 4, 4))
    return replace(config, llm=llama, precision="bf16", projector=projector, micro_batch_size=4)


@pytest.fixture
def grids(samples):
    clips = [sample.clip_id for sample in samples]
    return MemoryTokens(clips, {"dinov2": torch.randn(len(clips), 4, 4, 4, 8)})


def really_kept(plan):
    """Bytes that the backward pass of the first micro-batch holds besides parameters; its positions and its clips."""
    model, batch = plan.built.model, plan.batches.step(0).micro_batches[0]
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(value):
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    model.train()
    with saved_tensors_hooks(pack, lambda value: value), plan.built.autocast("cpu"):
        loss = model(batch)
    total = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert loss.requires_grad
    return total, batch.labels_BS.numel(), len(batch.clip_rows)


@pytest.mark.parametrize(
    ("train_llm", "is_on"),
    [("none", False), ("none", True), ("lora", False), ("lora", True), ("full", False), ("full", True)],
)
def test_the_estimate_is_what_autograd_keeps_within_a_tenth(wide, samples, grids, train_llm, is_on):
    plan = make_plan(replace(wide, train_llm=train_llm, activation_checkpointing=is_on), samples, grids)
    found = measure(plan.built, plan.record.shapes)
    kept, positions, clips = really_kept(plan)
    of_layers = LAYERS * (found.layer_input if is_on else found.layer) + found.outside
    copies = 0 if is_on else LAYERS * found.layer_copies
    assert kept == pytest.approx(of_layers * positions + copies + found.clip * clips, rel=0.1)


# Bytes per position and channel. A frozen layer keeps its two norms' inputs in fp32 (8), queries, keys, values and what
# attention gives (8), and of the feed-forward gate, its activation and the other factor in 16 bits (6 x 344 / 128).
# Trained, it keeps the inputs of its linear layers too, and the sums between the layers are in fp32.
@pytest.mark.parametrize(("train_llm", "wanted"), [("none", 8 + 8 + 6 * 344 / 128), ("lora", 69), ("full", 56)])
def test_what_a_layer_keeps_by_mode(wide, samples, grids, train_llm, wanted):
    plan = make_plan(replace(wide, train_llm=train_llm), samples, grids)
    found = measure(plan.built, plan.record.shapes)
    assert found.layer / WIDTH == pytest.approx(wanted, rel=0.03)
    assert found.num_layers == LAYERS
    # autocast casts the fp32 weights of a layer that is trained, all of its linear ones
    linear = 4 * WIDTH * WIDTH + 3 * WIDTH * FEEDFORWARD
    if train_llm == "full":
        assert found.layer_copies == pytest.approx(2 * linear, rel=0.02)
    if train_llm == "none":
        assert abs(found.layer_copies) < 1000


def test_measuring_changes_neither_the_model_nor_random_numbers(wide, samples, grids):
    plan = make_plan(replace(wide, train_llm="lora", activation_checkpointing=True), samples, grids)
    before = {name: value.clone() for name, value in plan.built.model.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    measure(plan.built, plan.record.shapes)
    assert torch.equal(torch.rand(3), wanted)
    for name, value in plan.built.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in plan.built.model.parameters())
    kept, positions, _ = really_kept(plan)
    assert kept < 20 * LAYERS * WIDTH * positions  # the layers are checkpointed again


def test_parts_add_up_and_equal_a_hand_computation(wide, samples, grids):
    plan = make_plan(replace(wide, train_llm="full"), samples, grids)
    report = describe(plan)
    memory = report["memory_bytes"]
    parameters = sum(part["total"] for part in report["parameters"].values())
    assert memory["parameters"] == memory["gradients"] == 4 * parameters  # all of it is trained, in fp32
    assert memory["moments"] == 8 * parameters
    assert memory["tokens"] == 4 * (4 * 4 * 4 * 8) * 4  # clips, grid, width, float32
    text, vocabulary = report["text_tokens"]["longest"], len(plan.built.llm.tokenizer)
    assert memory["logits"] == 16 * 4 * text * vocabulary
    found = measure(plan.built, plan.record.shapes)
    layers = ((LAYERS + 1) * found.layer + found.outside) * 4 * (text + 64)
    assert memory["activations"] == pytest.approx(layers + 4 * found.clip, rel=1e-6)
    parts = {name: value for name, value in memory.items() if name not in ("total", "activations_formula")}
    assert memory["total"] == sum(parts.values())


def test_what_is_frozen_has_neither_gradients_nor_moments(wide, samples, grids):
    plan = make_plan(replace(wide, train_llm="none"), samples, grids)
    trained = sum(p.numel() for p in plan.built.model.parameters() if p.requires_grad)
    memory = describe(plan)["memory_bytes"]
    assert (memory["gradients"], memory["moments"]) == (4 * trained, 8 * trained)
    assert memory["gradients"] < memory["parameters"]


def test_ranks_of_ddp_hold_the_whole_model_and_those_of_fsdp_a_share(wide, samples, grids):
    plan = make_plan(replace(wide, train_llm="full"), samples, grids)

    def memory(device):
        return memory_by_part(plan.built, plan.record.shapes, 20, device)

    alone, ddp, fsdp = (
        memory(device) for device in (Device(), Device(num_processes=4), Device(num_processes=4, is_sharded=True))
    )
    assert (ddp["parameters"], ddp["moments"]) == (alone["parameters"], alone["moments"])
    assert ddp["gradients"] == 2 * alone["gradients"]
    for part in ("parameters", "gradients", "moments"):
        assert fsdp[part] == alone[part] // 4, part
    assert fsdp["activations"] == alone["activations"]


def test_a_budget_bounds_the_positions(wide, samples, grids):
    plan = make_plan(replace(wide, train_llm="none", token_budget=500), samples, grids)
    found = measure(plan.built, plan.record.shapes)
    memory = memory_by_part(plan.built, plan.record.shapes, 20)
    clips = -(-500 // 65)
    assert memory["activations"] == pytest.approx(
        500 * ((LAYERS + 1) * found.layer + found.outside) + clips * found.clip, rel=1e-6
    )


def fitted(config, samples, source, memory, **options):
    return make_plan(config, samples, source, device=Device(memory=memory, **options)).config


def needed(config, samples, source, **changes):
    """Memory of a device that just holds a run with these settings."""
    plan = make_plan(replace(config, **changes), samples, source)
    longest = max(len(plan.batches.rendered(index).input_ids) for index in range(len(samples)))
    return int(memory_by_part(plan.built, plan.record.shapes, longest)["total"] / 0.92) + 2


def test_checkpointing_is_chosen_first_and_then_smaller_micro_batches(wide, samples, grids, caplog):
    caplog.set_level("INFO", "trainer")
    frozen = replace(wide, train_llm="none")
    assert fitted(frozen, samples, grids, None) == frozen
    assert fitted(frozen, samples, grids, needed(frozen, samples, grids)) == frozen
    assert caplog.messages == []
    on = fitted(frozen, samples, grids, needed(frozen, samples, grids, activation_checkpointing=True))
    assert (on.activation_checkpointing, on.micro_batch_size) == (True, 4)
    assert "activation_checkpointing is on" in caplog.text
    least = needed(frozen, samples, grids, activation_checkpointing=True, micro_batch_size=1)
    smallest = fitted(frozen, samples, grids, least)
    assert (smallest.activation_checkpointing, smallest.micro_batch_size) == (True, 1)
    assert "micro_batch_size 1 instead of micro_batch_size 4" in caplog.text
    with pytest.raises(UserError, match=r"a process at the least .* a larger --device-memory"):
        fitted(frozen, samples, grids, least - 1000)


def test_what_is_configured_is_kept(wide, samples, grids):
    off = replace(wide, train_llm="none", activation_checkpointing=False)
    smaller = fitted(off, samples, grids, needed(off, samples, grids, micro_batch_size=2))
    assert (smaller.activation_checkpointing, smaller.micro_batch_size) == (False, 2)
    means = replace(off, loss="micro_batch_means")
    with pytest.raises(UserError, match="activation_checkpointing: true; a smaller micro_batch_size"):
        fitted(means, samples, grids, needed(means, samples, grids, micro_batch_size=2))


def test_a_budget_is_halved(wide, samples, grids):
    budget = replace(wide, train_llm="none", token_budget=400, activation_checkpointing=False)
    smaller = fitted(budget, samples, grids, needed(budget, samples, grids, token_budget=200))
    assert smaller.token_budget == 200


def test_ddp_is_refused_where_one_process_cannot_hold_the_model(wide, samples, grids):
    whole = replace(wide, train_llm="full")
    memory = needed(whole, samples, grids, activation_checkpointing=True, micro_batch_size=1)
    fitted(whole, samples, grids, memory)
    with pytest.raises(UserError, match=r"under DDP, which holds the whole model .* --launch fsdp"):
        fitted(whole, samples, grids, memory, num_processes=2)
    fitted(whole, samples, grids, memory, num_processes=2, is_sharded=True)


def test_a_run_can_be_planned_for_another_machine(config):
    configured = replace(config, device_memory="80GB")
    assert planned_device(configured, None, None) == Device(memory=80 * GB)
    assert planned_device(configured, "ddp", 8) == Device(memory=80 * GB, num_processes=8)
    assert planned_device(configured, "fsdp", 8) == Device(memory=80 * GB, num_processes=8, is_sharded=True)
    for text in ("80", "GB", "80 TB", "0GB"):
        with pytest.raises(UserError, match="device_memory is a size such as 80GB"):
            replace(config, device_memory=text)


def test_large_llms_are_checkpointed_by_default(wide, samples, grids, monkeypatch):
    frozen = replace(wide, train_llm="none")
    assert not describe(make_plan(frozen, samples, grids))["activation_checkpointing"]
    monkeypatch.setattr("trainer.model.llm.CHECKPOINTING_PARAMETERS", 1e5)
    assert describe(make_plan(frozen, samples, grids))["activation_checkpointing"]
    off = replace(frozen, activation_checkpointing=False)
    assert not describe(make_plan(off, samples, grids))["activation_checkpointing"]


def test_a_budget_with_a_loss_that_depends_on_micro_batches_is_refused(wide):
    with pytest.raises(UserError, match="micro_batch_means depends on which samples share a micro-batch"):
        replace(wide, loss="micro_batch_means", token_budget=100)
