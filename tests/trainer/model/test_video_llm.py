import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mervcache.errors import UserError
from trainer.config import FusionConfig, ProjectorConfig
from trainer.data.collate import collate
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.data.tokens import TokenShape
from trainer.model.fusion import build_fusion
from trainer.model.projectors import Projector
from trainer.model.video_llm import VideoLLM

X = IGNORE_INDEX
FIRST = Rendered(input_ids=(1, 5, 6, 7, 2), labels=(X, X, X, 7, 2), visual_at=1)
SECOND = Rendered(input_ids=(3, 9, 2), labels=(X, 9, 2), visual_at=0)
TOKENS = {"dinov2": torch.randn(2, 1, 1, 2, 4, generator=torch.Generator().manual_seed(0))}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def model_of(make):
    torch.manual_seed(5)
    shape = TokenShape(grid=(1, 1, 2), width=4, is_pooled=True, identity="test")
    projectors = {"dinov2": Projector(ProjectorConfig(), shape, 16)}
    return VideoLLM(make(), projectors, build_fusion(FusionConfig(), 1, 16)).eval()


@pytest.fixture(params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request):
    return model_of(request.param)


def batch_of(rendered, rows):
    return collate(rendered, rows, TOKENS if max(rows) >= 0 else {}, num_visual_tokens=2)


def loss_by_hand(model, sample, clip):
    """One unpadded sequence, all its logits, the plain definition."""
    table = model.llm.get_input_embeddings().weight
    text = table[list(sample.input_ids)]
    visual = model.projectors[0].head(TOKENS["dinov2"][clip].reshape(2, 4)) if clip is not None else text[:0]
    sequence = torch.cat([text[: sample.visual_at], visual, text[sample.visual_at :]])
    labels = [*sample.labels[: sample.visual_at], *[X] * len(visual), *sample.labels[sample.visual_at :]]
    logs = model.llm(inputs_embeds=sequence[None]).logits[0].log_softmax(-1)
    return -sum(logs[place - 1, label] for place, label in enumerate(labels) if label != X)


def test_the_loss_is_the_sum_over_supervised_tokens_whatever_the_padding(model):
    expected = loss_by_hand(model, FIRST, 1) + loss_by_hand(model, SECOND, 0) + loss_by_hand(model, FIRST, None)
    torch.testing.assert_close(model(batch_of([FIRST, SECOND, FIRST], [1, 0, -1])), expected)


def test_the_output_layer_reads_only_the_places_that_predict_a_label_in_one_piece(model):
    batch, read = batch_of([FIRST, SECOND], [0, 1]), []
    model.llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(batch)
    assert batch.first_label == 3  # behind two visual tokens and one of text
    assert [tuple(hidden_BPM.shape) for hidden_BPM in read] == [(2, 7 - 3, 16)]
    assert read[0].is_contiguous()  # or torch copies the output layer once per sample


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_a_settled_model_runs_its_output_layer_at_supervised_places_alone(model, monkeypatch, rows):
    if rows is not None:  # several chunks, which are computed again in the backward pass
        monkeypatch.setattr("trainer.model.video_llm.LOGIT_BYTES", rows * 12 * 4)
    batch, read = batch_of([FIRST, SECOND, FIRST], [1, 0, -1]), []
    wanted = model.token_losses(batch)
    wanted.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.settle(longest=20)
    assert model.has_plain_head
    model.llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    found = model.token_losses(batch)
    assert sum(read) == 6  # labels of the three samples
    assert max(read) == (rows or 6)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_a_settled_model_takes_a_batch_without_labels(model):
    model.settle(longest=20)
    unsupervised = Rendered(input_ids=(1, 5), labels=(X, X), visual_at=1)
    loss = model(batch_of([unsupervised, unsupervised], [0, 1]))
    loss.backward()
    assert loss.item() == 0.0


FUSED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.trainer.model.test_video_llm import FIRST, SECOND, batch_of, llama, model_of

model, batch = model_of(llama), batch_of([FIRST, SECOND, FIRST], [1, 0, -1])
model.settle(longest=20)
wanted = model(batch) / 6
wanted.backward()
gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
model.fuse_loss()
found = model(batch) / 6
found.backward()
torch.testing.assert_close(found, wanted)
for name, parameter in model.named_parameters():
    if parameter.grad is not None:
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_fused_loss_is_the_loss():
    """Triton interprets the kernel on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", FUSED, str(Path(__file__).resolve().parents[3])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fused_loss_that_cannot_be_had_is_refused(model):
    with pytest.raises(UserError, match="liger-kernel" if find_spec("liger_kernel") is None else "not a linear layer"):
        model.fuse_loss()


def test_visual_tokens_stand_behind_the_bos_or_first(model):
    embeddings_BSM = model.splice(batch_of([FIRST, SECOND], [0, 1]))
    visual_CNM, _ = model.visual_tokens(TOKENS)
    table = model.llm.get_input_embeddings().weight
    torch.testing.assert_close(embeddings_BSM[0], torch.cat([table[[1]], visual_CNM[0], table[[5, 6, 7, 2]]]))
    torch.testing.assert_close(embeddings_BSM[1, :5], torch.cat([visual_CNM[1], table[[3, 9, 2]]]))
    assert not embeddings_BSM[1, 5:].any()


def test_scores_are_mean_log_likelihoods(model):
    scores_B = model.score(batch_of([FIRST, SECOND], [0, 1]))
    expected = torch.stack([-loss_by_hand(model, FIRST, 0) / 2, -loss_by_hand(model, SECOND, 1) / 2])
    torch.testing.assert_close(scores_B, expected)


def test_a_batch_of_text_still_reaches_every_visual_parameter(model):
    model.train()
    model(batch_of([SECOND], [-1])).backward()
    for parameter in model.projectors.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_frozen_llm_is_left_in_evaluation_mode(model):
    model.llm.requires_grad_(False)
    assert not model.train().llm.training
    model.llm.requires_grad_(True)
    assert model.train().llm.training


def test_generation_of_a_padded_batch_equals_generation_one_by_one(model):
    questions = [
        Rendered(input_ids=(1, 5, 6, 7), labels=(X,) * 4, visual_at=1),
        Rendered(input_ids=(3, 9), labels=(X,) * 2, visual_at=0),
    ]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    together = model.generate(batch_of(questions, [0, 1]), **options)
    for index, question in enumerate(questions):
        alone = model.generate(collate([question], [index], TOKENS, num_visual_tokens=2), **options)
        assert together[index].tolist() == alone[0].tolist()


def test_a_model_without_projectors_is_the_plain_llm():
    torch.manual_seed(5)
    model = VideoLLM(llama(), {}, None).eval()
    assert model.num_visual_tokens == 0
    batch = collate([FIRST], [-1], {}, num_visual_tokens=0)
    expected = model.llm(input_ids=batch.input_ids_BL, labels=batch.labels_BS).loss * 2
    torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("fusion", ["cross_attention", "concat_sequence", "equal_mix"])
def test_a_sample_under_a_mask_is_read_as_by_a_model_of_the_shown_encoders(fusion):
    torch.manual_seed(5)
    shape = TokenShape(grid=(1, 1, 2), width=4, is_pooled=True, identity="test")
    names = ("dinov2", "vivit")
    projectors = {name: Projector(ProjectorConfig(), shape, 16) for name in names}
    both = VideoLLM(llama(), projectors, build_fusion(FusionConfig(name=fusion), 2, 16)).eval()
    tokens = {name: torch.randn(2, 1, 1, 2, 4) for name in names}
    masks = [(True, True), (False, True)]
    count, leaves_out = both.num_visual_tokens, both.fusion.leaves_out_masked
    batch = collate([FIRST, SECOND], [0, 1], tokens, num_visual_tokens=count, masks=masks, leaves_out_masked=leaves_out)
    losses_B = both.sample_losses(batch)
    whole = both.sample_losses(collate([FIRST], [0], {n: t[:1] for n, t in tokens.items()}, num_visual_tokens=count))
    one = VideoLLM(both.llm, {"vivit": projectors["vivit"]}, build_fusion(FusionConfig(name=fusion), 1, 16)).eval()
    if fusion == "cross_attention":
        one.fusion.query_M = both.fusion.query_M
    alone = one.sample_losses(collate([SECOND], [0], {"vivit": tokens["vivit"][1:]}, num_visual_tokens=2))
    torch.testing.assert_close(losses_B, torch.cat([whole, alone]))
