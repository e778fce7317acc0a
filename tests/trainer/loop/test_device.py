"""FLOPs of training against torch's own counter, and the table of devices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import LoraConfig, TrainConfig
from trainer.loop.device import Device, TrainingFlops, peak_flops
from trainer.model.llm import adapt
from trainer.model.video_llm import VideoLLM
from trainer.runs.run_record import read_metrics


def make(mode):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    llm = LlamaForCausalLM(config)
    adapt(llm, TrainConfig(llm="named", train_llm=mode, lora=LoraConfig(rank=4, dropout=0.0)))
    return llm


@pytest.mark.parametrize("mode", ["none", "lora", "full"])
def test_flops_are_those_that_torch_counts(mode):
    llm, positions = make(mode), 7
    embeddings_BSM = torch.randn(1, positions, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # counts no product of the CPU's fused attention
        llm(inputs_embeds=embeddings_BSM, use_cache=False).logits.sum().backward()
    flops = TrainingFlops.of(VideoLLM(llm, {}, None))
    assert flops.of_steps(positions, positions) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA L40S", 362e12),
        ("Quadro P2000", None),
    ],
)
def test_a_device_is_known_by_a_part_of_its_name(name, peak):
    assert peak_flops(name) == peak


def test_a_cpu_has_no_peak_and_no_memory_of_its_own(brief, tmp_path):
    assert Device(torch.device("cpu")).figures(1e9) == {}
    row = read_metrics(tmp_path / "run")[0]
    assert {"tokens_per_s", "data_wait", "wait_share"} <= row.keys()
    assert not {"mfu", "peak_memory"} & row.keys()
    assert row["data_wait"] >= 0
