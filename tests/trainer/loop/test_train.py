import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mervcache.errors import StoreDamagedError, UserError
from trainer.config import FUSIONS, FusionConfig, read_config
from trainer.data.tokens import MemoryTokens
from trainer.loop.optimizer import build_optimizer, rate_factor
from trainer.loop.plan import describe, make_plan
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.runs.stage_folders import METRICS_FILE

pytestmark = pytest.mark.slow


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def run_to_end(config, samples, tokens, out, **options):
    return train(config, samples, tokens, out, quiet=True, **options)


@pytest.fixture
def finished(tmp_path, config, samples, tokens):
    """A whole run of six steps."""
    out = tmp_path / "whole"
    return out, run_to_end(config, samples, tokens, out)


def test_a_small_model_learns_its_samples_by_heart(tmp_path, config, samples, tokens):
    result = run_to_end(replace(config, max_steps=100, checkpoint_every=100), samples, tokens, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == result.steps == 100
    assert found[0] > 1.5
    assert found[-1] < 0.1


def test_a_log_begins_with_the_start_and_that_a_run_without_checkpoint_begins_again(
    tmp_path, config, samples, tokens, caplog
):
    out = tmp_path / "run"
    caplog.set_level("INFO", "trainer")

    def first_message(**options):
        caplog.clear()
        train(config, samples, tokens, out, resume=True, **options)
        return caplog.messages[0]

    start = f"{out} starts: 6 steps of {config.batch_size} samples, {config.llm}, tokens of "
    assert first_message(stop_at=2).startswith(start)
    assert first_message(stop_at=4).startswith(f"{out} resumes after step 2: ")
    shutil.rmtree(out / "checkpoints")
    assert first_message().startswith(f"{out} had no checkpoint yet and starts again: ")


def test_a_run_is_refused_where_none_can_be_kept(tmp_path, config, samples, tokens):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a run is a folder, and .*file is a file: give another --out"):
        run_to_end(config, samples, tokens, tmp_path / "file" / "run")


def test_processes_that_opened_different_data_are_refused(tmp_path, config, samples, tokens, monkeypatch):
    """As if another process had opened the store a snapshot earlier."""
    monkeypatch.setattr("trainer.loop.train.gather_object", lambda found: [*found, "0" * 64])
    with pytest.raises(UserError, match=r"opened different data \(000000000000, .*start the same command again"):
        run_to_end(config, samples, tokens, tmp_path / "run")


def test_the_first_loss_equals_a_hand_computation(finished, config, samples, tokens):
    plan = make_plan(config, samples, tokens)
    for encoder, projector in zip(plan.built.model.encoders, plan.built.model.projectors, strict=True):
        values_BTHWD = projector.resample(tokens.fetch([sample.clip_id for sample in samples])[encoder])
        projector.standardise.mean_D.copy_(values_BTHWD.mean((0, 1, 2, 3)))
        projector.standardise.std_D.copy_(values_BTHWD.std((0, 1, 2, 3), correction=0))
    model, total, count = plan.built.model.eval(), 0.0, 0
    for index in plan.batches.order.batch(0):
        rendered = plan.batches.rendered(index)
        text = model.llm.get_input_embeddings().weight[list(rendered.input_ids)]
        visual = model.visual_tokens(tokens.fetch([plan.data.samples[index].clip_id]))[0][0]
        logs = model.llm(inputs_embeds=torch.cat([text[:1], visual, text[1:]])[None]).logits[0].log_softmax(-1)
        shifted = [(place + len(visual), label) for place, label in enumerate(rendered.labels) if label >= 0]
        total -= sum(logs[place - 1, label].item() for place, label in shifted)
        count += len(shifted)
    assert losses(finished[0])[0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_run_that_is_stopped_and_resumed_has_the_same_losses_to_the_bit(
    tmp_path, config, samples, tokens, finished, stop_at
):
    out = tmp_path / "parts"
    assert run_to_end(config, samples, tokens, out, stop_at=stop_at).steps == stop_at
    result = run_to_end(config, samples, tokens, out, resume=True)
    assert (result.steps, result.num_steps) == (6, 6)
    assert losses(out) == losses(finished[0])
    one, other = (checkpoint.load_state(checkpoint.newest(run)).sha256 for run in (out, finished[0]))
    assert one == other


def test_steps_behind_the_last_checkpoint_are_done_again_and_listed_once(tmp_path, config, samples, tokens, finished):
    out = tmp_path / "killed"
    run_to_end(config, samples, tokens, out)
    for folder in checkpoint.checkpoints(out)[1:]:
        shutil.rmtree(folder)  # as if killed after step 6, before the checkpoint of step 4
    with (out / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # and in the middle of a line
    run_to_end(config, samples, tokens, out, resume=True)
    assert losses(out) == losses(finished[0])


def test_a_kill_behind_any_checkpoint_loses_no_metrics(tmp_path, config, samples, tokens, finished, monkeypatch):
    config, save, left = replace(config, log_every=100), checkpoint.save, []

    def save_and_look(run, **options):
        folder = save(run, **options)
        left.append(shutil.copytree(run, tmp_path / f"killed-{len(left)}"))  # what a kill at this moment leaves
        return folder

    monkeypatch.setattr(checkpoint, "save", save_and_look)
    run_to_end(config, samples, tokens, tmp_path / "run")
    monkeypatch.undo()
    assert [checkpoint.load_state(checkpoint.newest(run)).step for run in left] == [2, 4, 6]
    for run in left[:2]:
        run_to_end(config, samples, tokens, run, resume=True)
        assert [row["step"] for row in read_metrics(run)] == list(range(6))
        assert losses(run) == losses(finished[0])


def test_the_micro_batch_changes_no_loss(tmp_path, config, samples, tokens, finished):
    run_to_end(replace(config, micro_batch_size=1), samples, tokens, tmp_path / "small")
    assert losses(tmp_path / "small") == pytest.approx(losses(finished[0]), rel=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_trains_and_loads_again(tmp_path, config, samples, tokens, fusion):
    config = replace(config, fusion=FusionConfig(name=fusion, query_width=16), max_steps=3)
    run_to_end(config, samples, tokens, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.step == 3
    assert run.built.config == config
    assert run.built.model.num_visual_tokens == (16 if fusion == "concat_sequence" else 8)
    assert set(run.record.shapes) == ({"dinov2"} if fusion == "first" else {"dinov2", "vivit"})
    for name, parameter in run.built.model.named_parameters():
        assert parameter.isfinite().all(), name


def test_a_frozen_llm_does_not_change_and_the_visual_path_does(tmp_path, config, samples, tokens):
    frozen = replace(config, train_llm="none", allow_fresh_frozen=True)
    before = make_plan(frozen, samples, tokens).built.model.state_dict()
    run_to_end(frozen, samples, tokens, tmp_path / "run")
    after = load_run(tmp_path / "run").built.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("llm.") for name in changed)
    heads = [f"projectors.{index}.head.{part}" for index in (0, 1) for part in ("weight", "bias")]
    assert changed >= {"fusion.query_M", *heads}


def test_text_only_training_loads_as_the_plain_llm(tmp_path, config, samples, tokens):
    run_to_end(replace(config, mode="text-only"), samples, tokens, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert (run.built.model.fusion, run.record.num_visual_tokens, dict(run.record.shapes)) == (None, 0, {})


def test_only_the_last_checkpoints_are_kept(tmp_path, config, samples, tokens):
    run_to_end(replace(config, keep_checkpoints=2), samples, tokens, tmp_path / "run")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000006"]


def test_a_checkpoint_without_its_state_does_not_exist(finished):
    out, _ = finished
    (checkpoint.newest(out) / checkpoint.STATE_FILE).unlink()
    assert checkpoint.newest(out).name == "step-00000004"


def test_a_flipped_bit_in_a_checkpoint_is_found(finished):
    path = checkpoint.newest(finished[0]) / checkpoint.MODEL_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="differs from its digest"):
        load_run(finished[0])


def test_a_run_is_not_overwritten(finished, config, samples, tokens):
    with pytest.raises(UserError, match="holds a run already; go on with --resume auto"):
        run_to_end(config, samples, tokens, finished[0])


def test_a_run_is_not_continued_with_other_settings(finished, config, samples, tokens):
    with pytest.raises(UserError, match="seed was 7, is 8"):
        run_to_end(replace(config, seed=8), samples, tokens, finished[0], resume=True)


def test_a_run_is_not_continued_on_other_data(finished, config, samples, tokens):
    ids = [sample.clip_id for sample in samples]
    other = MemoryTokens(ids, {encoder: values + 1 for encoder, values in tokens.fetch(ids).items()})
    with pytest.raises(UserError, match="samples or tokens have changed"):
        run_to_end(config, samples, other, finished[0], resume=True)


def test_a_finished_run_resumes_to_nothing(finished, config, samples, tokens):
    out, result = finished
    before = losses(out)
    assert run_to_end(config, samples, tokens, out, resume=True).steps == result.steps
    assert losses(out) == before


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(tmp_path, config, samples, tokens, finished):
    class Interrupting(MemoryTokens):
        """Sends this process a SIGTERM while step 2 is read."""

        reads = 0

        def fetch(self, clip_ids):
            self.reads += 1
            if self.reads == 6:  # one for the constants, two for each step
                os.kill(os.getpid(), signal.SIGTERM)
            return super().fetch(clip_ids)

    ids = [sample.clip_id for sample in samples]
    source = Interrupting(ids, tokens.fetch(ids))
    config = replace(config, checkpoint_every=100, prefetch_batches=1)
    handler = signal.getsignal(signal.SIGTERM)
    result = run_to_end(config, samples, source, tmp_path / "run")
    assert 1 <= result.steps < 6
    assert signal.getsignal(signal.SIGTERM) is handler
    run_to_end(config, samples, tokens, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(finished[0])


def test_metrics_hold_speed_and_rates(finished):
    rows = read_metrics(finished[0])
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["samples"] == 6 and row["supervised_tokens"] == 12 for row in rows)
    assert all(0 <= row["wait_share"] <= 1 and row["tokens_per_s"] > row["samples_per_s"] > 0 for row in rows)
    assert rows[0]["projector_lr"] == pytest.approx(3e-3)  # no whole step of warm-up in six


def test_the_rate_warms_up_and_falls_to_zero():
    factors = [rate_factor(step, 12, 2) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert factors[3] == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert factors[12] == pytest.approx(0)


def test_parts_have_their_own_rate_and_vectors_do_not_decay(config, samples, tokens):
    model = make_plan(config, samples, tokens).built.model
    settings = replace(config.optimizer, projector_lr=1.0, fusion_lr=2.0, llm_lr=3.0, weight_decay=0.1)
    groups = build_optimizer(model, settings).param_groups
    by_parameter = {id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(by_parameter) == len(list(model.parameters()))
    assert by_parameter[id(model.projectors[0].head.weight)] == (1.0, 0.1)
    assert by_parameter[id(model.projectors[0].head.bias)] == (1.0, 0.0)
    assert by_parameter[id(model.fusion.query_M)] == (2.0, 0.0)
    assert by_parameter[id(model.llm.lm_head.weight)] == (3.0, 0.1)


def test_nothing_to_train_is_an_error(config, samples, tokens):
    plan = make_plan(replace(config, train_llm="none", allow_fresh_frozen=True), samples, tokens)
    plan.built.model.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trained"):
        build_optimizer(plan.built.model, config.optimizer)


def test_a_dry_run_reports_sizes_lengths_and_what_is_dropped(config, samples, tokens, make_sample):
    report = describe(make_plan(replace(config, max_text_tokens=9), [*samples, make_sample(50)], tokens))
    assert report["samples"] == report["without_answer"] == 18  # "<s> In : What colour is it ? Out :" is ten
    assert report["dropped"] == {"clip without tokens of every encoder": 1}
    assert (report["visual_tokens"], report["longest_sequence"], report["steps"]) == (8, 17, 6)
    assert report["parameters"]["projectors"] == {"total": 8 * 32 + 6 * 32 + 2 * 32, "trained": 512}
    assert report["encoders"] == {"dinov2": [4, 2, 2, 8], "vivit": [4, 2, 2, 6]}


def test_encoders_of_unlike_grids_are_refused_with_both(config, samples, tokens):
    ids = [sample.clip_id for sample in samples]
    found = tokens.fetch(ids)
    source = MemoryTokens(ids, {**found, "vivit": found["vivit"][:, :2]})
    config = replace(config, projector=replace(config.projector, grid=None))
    with pytest.raises(UserError, match="dinov2 4x2x2, vivit 2x2x2"):
        make_plan(config, samples, source)


def test_checkpoints_are_written_by_the_clock_too(tmp_path, config, samples, tokens):
    settings = replace(config, checkpoint_every=100, checkpoint_minutes=1e-9, max_steps=3)
    run_to_end(settings, samples, tokens, tmp_path / "run")
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path / "run")] == ["1", "2", "3"]


def test_settings_that_change_no_loss_may_change_on_resume_and_are_kept(tmp_path, config, samples, tokens, finished):
    out = tmp_path / "parts"
    run_to_end(config, samples, tokens, out, stop_at=2)
    other = replace(
        config, log_every=1, checkpoint_every=3, activation_checkpointing=True, micro_batch_size=2, deterministic=True
    )
    run_to_end(other, samples, tokens, out, resume=True)
    assert losses(out) == pytest.approx(losses(finished[0]), rel=1e-4)
    assert read_config(out) == other


def test_the_mean_of_micro_batches_fixes_their_size(tmp_path, config, samples, tokens):
    released = replace(config, loss="micro_batch_means")
    run_to_end(released, samples, tokens, tmp_path / "run", stop_at=1)
    with pytest.raises(UserError, match="micro_batch_size was 4, is 2"):
        run_to_end(replace(released, micro_batch_size=2), samples, tokens, tmp_path / "run", resume=True)


def test_a_deterministic_run_sets_torch_and_resets_it(tmp_path, config, samples, tokens, finished):
    seen = []

    class Watching(MemoryTokens):
        def fetch(self, clip_ids):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().fetch(clip_ids)

    ids = [sample.clip_id for sample in samples]
    source = Watching(ids, tokens.fetch(ids))
    run_to_end(replace(config, deterministic=True), samples, source, tmp_path / "run")
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "run") == losses(finished[0])


def test_runs_of_unlike_precision_follow_each_other_in_one_process(tmp_path, config, samples, tokens, finished):
    run_to_end(replace(config, precision="bf16"), samples, tokens, tmp_path / "half")
    run_to_end(config, samples, tokens, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(finished[0])
    assert losses(tmp_path / "half") == pytest.approx(losses(finished[0]), rel=5e-2)
    assert losses(tmp_path / "half") != losses(finished[0])


@pytest.mark.parametrize("changes", [{"eval_every": 0}, {"eval_limit": 0}, {"checkpoint_minutes": 0.0}])
def test_counts_of_nothing_are_refused(config, changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        replace(config, **changes)


@pytest.mark.parametrize("clip_norm", [0.01, 0.0])
def test_gradients_are_clipped_to_one_norm_over_all_parts_or_left_alone(tmp_path, config, samples, tokens, clip_norm):
    settings = replace(config, max_steps=1, optimizer=replace(config.optimizer, clip_norm=clip_norm))
    train(settings, samples, tokens, tmp_path / "run", quiet=True)
    moments = load_file(checkpoint.newest(tmp_path / "run") / checkpoint.OPTIMIZER_FILE)
    # AdamW's first moment after one step is a tenth of the gradient it was given.
    given = sum(value.double().square().sum() for name, value in moments.items() if name.endswith("/exp_avg")) ** 0.5
    (row,) = read_metrics(tmp_path / "run")
    assert row["grad_norm"] > 0.01  # as it was before
    assert 10 * given.item() == pytest.approx(clip_norm or row["grad_norm"], rel=1e-4)
