"""Steps whose loss or gradient is not finite. One clip's tokens hold an infinite value, or all of them do."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from featurestore import StoreWriter
from featurestore.clips import Turn
from mervcache.errors import EXIT_WITH_FAILURES, NonFiniteError
from trainer.cli import train_main
from trainer.data.order import derive_seed
from trainer.data.tokens import MemoryTokens
from trainer.loop.optimizer import build_optimizer
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import load_llm
from trainer.runs import checkpoint
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.runs.stage_folders import METRICS_FILE
from trainer.runs.weight_names import to_model_names

pytestmark = pytest.mark.slow


@pytest.fixture
def plain(config):
    """Without measured constants, which an infinite token would spoil for all clips."""
    return replace(config, projector=replace(config.projector, standardise=False), log_every=1)


@pytest.fixture
def source_with(samples, tokens):
    """The tokens, those of some clips with an infinite value."""

    def make(*odd):
        ids = [sample.clip_id for sample in samples]
        found = {encoder: values.clone() for encoder, values in tokens.fetch(ids).items()}
        for index in odd:
            found["vivit"][index, 0, 0, 0, 0] = torch.inf
        return MemoryTokens(ids, found)

    return make


def weights_of(folder):
    """Weights by their names in the model, where a projector has a place instead of its encoder's name."""
    encoders = list(json.loads((folder / "state.json").read_text())["identities"])
    return to_model_names(load_file(folder / checkpoint.MODEL_FILE), encoders)


def odd_steps(plan, clip_index):
    """Steps whose batch holds that sample."""
    return [step for step in range(plan.batches.num_steps) if clip_index in plan.batches.order.batch(step)]


def train_by_hand(config, samples, source):
    """The same run in plain torch, where a step with a loss that is not finite does nothing: losses and model."""
    plan = make_plan(config, samples, source)
    model, losses = plan.built.model, []
    optimizer = build_optimizer(model, config.optimizer)
    for number in range(config.max_steps):
        step = plan.batches.step(number)
        torch.manual_seed(derive_seed("step", config.seed, number, 0))
        model.train()
        parts = [model(b) / d for b, d in zip(step.micro_batches, step.divisors, strict=True)]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:  # 6 steps have no whole step of warm-up
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * number / config.max_steps))
        if math.isfinite(losses[-1]):
            optimizer.step()
        optimizer.zero_grad()
    return losses, model


def test_a_skipped_step_changes_nothing_and_the_run_is_that_of_a_plain_loop_that_skips_it(
    tmp_path, plain, samples, source_with
):
    source, out = source_with(5), tmp_path / "run"
    odd = odd_steps(make_plan(plain, samples, source), 5)
    assert odd  # two epochs: the sample comes twice
    result = train(plain, samples, source, out, quiet=True)
    losses, model = train_by_hand(plain, samples, source)
    rows = read_metrics(out)
    assert [row["step"] for row in rows if row["skipped"]] == odd == [i for i, v in enumerate(losses) if v != v]
    assert [row["loss"] for row in rows] == [None if value != value else pytest.approx(value) for value in losses]
    assert (result.steps, result.skipped, result.is_complete) == (6, len(odd), False)
    found = weights_of(checkpoint.newest(out))
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name
    updates = load_file(checkpoint.newest(out) / checkpoint.OPTIMIZER_FILE)
    assert {value.item() for name, value in updates.items() if name.endswith("/step")} == {6 - len(odd)}


def test_metrics_are_json_that_every_reader_takes(tmp_path, plain, samples, source_with):
    train(plain, samples, source_with(5), tmp_path / "run", quiet=True)

    def refuse(word):
        raise ValueError(word)

    for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_run_resumed_behind_a_skipped_step_is_the_run_that_was_not_stopped(
    tmp_path, plain, samples, source_with, stop_at
):
    source = source_with(5)
    whole = train(plain, samples, source, tmp_path / "whole", quiet=True)
    train(plain, samples, source, tmp_path / "parts", stop_at=stop_at, quiet=True)
    parts = train(plain, samples, source, tmp_path / "parts", resume=True, quiet=True)
    assert (parts.skipped, parts.loss) == (whole.skipped, whole.loss)
    one, other = (checkpoint.load_state(checkpoint.newest(tmp_path / run)).sha256 for run in ("whole", "parts"))
    assert one == other


def test_a_checkpoint_without_numbers_of_updates_is_resumed_with_its_step(tmp_path, plain, samples, tokens):
    """As earlier versions wrote them: no step was skipped there."""
    train(plain, samples, tokens, tmp_path / "whole", quiet=True)
    train(plain, samples, tokens, tmp_path / "old", stop_at=4, quiet=True)
    make_old(checkpoint.newest(tmp_path / "old"))
    train(plain, samples, tokens, tmp_path / "old", resume=True, quiet=True)
    one, other = (weights_of(checkpoint.newest(tmp_path / run)) for run in ("whole", "old"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def make_old(folder, **spoiled):
    """Rewrite a checkpoint as version 0.1 wrote it, with tensors `spoiled`."""
    state = json.loads((folder / checkpoint.STATE_FILE).read_text())
    state = {n: state[n] for n in ("step", "data_digest", "identities", "sha256", "validation")}
    optimizer = load_file(folder / checkpoint.OPTIMIZER_FILE)
    save_file({n: v for n, v in optimizer.items() if not n.endswith("/step")}, folder / checkpoint.OPTIMIZER_FILE)
    save_file({**weights_of(folder), **spoiled}, folder / checkpoint.MODEL_FILE)
    state["sha256"] = {name: checkpoint.file_sha256(folder / name) for name in state["sha256"]}
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))


def test_too_many_in_a_row_end_the_run_with_the_step_and_the_place(tmp_path, plain, samples, source_with):
    config, out = replace(plain, max_skipped_in_row=3, checkpoint_every=2), tmp_path / "run"
    with pytest.raises(
        NonFiniteError, match=r"steps 0 to 2 of .*, 3 in a row.* In step 2 the first .* is the output"
    ) as e:
        train(config, samples, source_with(*range(18)), out, quiet=True)
    # The average pools the infinite value into its cell, before the head of the second projector.
    assert "the output of projectors.1.resample" in str(e.value)
    assert [row["skipped"] for row in read_metrics(out)] == [1, 1, 1]
    for folder in checkpoint.checkpoints(out):
        assert all(value.isfinite().all() for value in weights_of(folder).values())


def test_what_was_trained_before_the_last_steps_is_saved(tmp_path, plain, samples, tokens, source_with):
    config, out = replace(plain, max_skipped_in_row=2, checkpoint_every=100), tmp_path / "run"

    class Spoiled(MemoryTokens):
        """Infinite from the third step on."""

        fetches = 0

        def fetch(self, clip_ids):
            self.fetches += 1
            found = super().fetch(clip_ids)
            if self.fetches > 4:  # two micro-batches each
                found["vivit"] = found["vivit"] * torch.inf
            return found

    ids = [sample.clip_id for sample in samples]
    source = Spoiled(ids, tokens.fetch(ids))
    with pytest.raises(NonFiniteError, match="steps 2 to 3 of "):
        train(replace(config, prefetch_batches=1), samples, source, out, quiet=True)
    state = checkpoint.load_state(checkpoint.newest(out))
    assert (state.step, state.skipped) == (2, 0)
    train(config, samples, tokens, out, resume=True, quiet=True)
    train(config, samples, tokens, tmp_path / "whole", quiet=True)
    one, other = (weights_of(checkpoint.newest(run)) for run in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    for odd in (
        {"weights": {"a": torch.tensor([1.0, torch.nan])}},
        {"optimizer": {"a/exp_avg": torch.tensor(torch.inf)}},
    ):
        tensors = {"weights": {}, "optimizer": {}} | odd
        with pytest.raises(
            NonFiniteError, match=f"the {next(iter(odd))} of step 3 are not finite and are not saved: a"
        ):
            checkpoint.save(tmp_path, step=3, **tensors, data_digest="", identities={}, keep=1)
    assert list(tmp_path.rglob("*")) == []


def test_a_run_does_not_begin_with_weights_that_it_could_not_save(tmp_path, plain, samples, tokens, pretrained):
    path = tmp_path / "llm/model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][0] = torch.inf  # of <unk>, which no sample holds: losses would be finite
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"llm\.model\.embed_tokens\.weight holds infinite values"):
        train(replace(plain, llm=pretrained), samples, tokens, tmp_path / "run", quiet=True)


def save_validated(run, step, **validation):
    checkpoint.save(
        run, step=step, weights={}, optimizer={}, data_digest="", identities={}, keep=9, validation=validation
    )


def test_a_validation_that_is_not_finite_is_better_than_none(tmp_path):
    nan, inf = float("nan"), float("inf")
    save_validated(tmp_path, 1, val_loss=nan)
    save_validated(tmp_path, 2, val_accuracy=nan, val_loss=0.1)
    save_validated(tmp_path, 3, val_accuracy=0.9, val_loss=-inf)
    assert checkpoint.best(tmp_path) is None
    save_validated(tmp_path, 4, val_accuracy=0.25, val_loss=1.2)
    save_validated(tmp_path, 5, val_accuracy=0.26, val_loss=nan)
    assert checkpoint.best(tmp_path).name == "step-00000004"
    finite, odd = {"val_accuracy": 0.25, "val_loss": 1.2}, {"val_accuracy": 0.26, "val_loss": nan}
    assert checkpoint.goodness(finite) > checkpoint.goodness(odd)
    assert checkpoint.read_state(checkpoint.newest(tmp_path)).validation == {"val_accuracy": 0.26, "val_loss": None}


def test_a_validation_that_is_not_finite_is_counted_and_not_the_best(
    tmp_path, plain, samples, tokens, source_with, make_sample, caplog
):
    heldout = [make_sample(index, split="heldout") for index in (3, 4)]  # clips that others are trained on
    trained = [sample for sample in samples if sample.sample_id not in ("s003", "s004")]
    config = replace(plain, eval_every=2, optimizer=replace(plain.optimizer, projector_lr=1e-3))
    result = train(config, [*trained, *heldout], source_with(3), tmp_path / "run", quiet=True)
    assert (result.skipped, result.unranked, result.best) == (0, 3, "")
    assert "val_loss, val_loss_video, val_accuracy is not finite" in caplog.text
    assert [row["val_accuracy"] for row in read_metrics(tmp_path / "run") if "val_accuracy" in row] == [None] * 3
    result = train(config, [*trained, *heldout], tokens, tmp_path / "good", quiet=True)
    assert (result.unranked, bool(result.best)) == (0, True)


def test_an_earlier_run_goes_on_from_its_last_finite_checkpoint(tmp_path, plain, samples, tokens, caplog):
    config = replace(plain, keep_checkpoints=2)
    train(config, samples, tokens, tmp_path / "whole", quiet=True)
    out = tmp_path / "old"
    train(replace(config, keep_checkpoints=5), samples, tokens, out, quiet=True)
    for step in (4, 6):
        folder = out / f"checkpoints/step-{step:08d}"
        make_old(folder, **{"fusion.query_M": weights_of(folder)["fusion.query_M"] * torch.nan})
    assert load_run(out).step == 2
    assert "step-00000006 is left out, its weights are not finite: fusion.query_M" in caplog.text
    result = train(config, samples, tokens, out, resume=True, quiet=True)
    assert result.steps == 6
    assert [row["loss"] for row in read_metrics(out)] == [row["loss"] for row in read_metrics(tmp_path / "whole")]
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["nonfinite-step-00000004", "nonfinite-step-00000006", "step-00000004", "step-00000006"]


def test_a_run_without_a_finite_checkpoint_is_refused(tmp_path, plain, samples, tokens):
    out = tmp_path / "old"
    train(replace(plain, keep_checkpoints=1), samples, tokens, out, quiet=True)
    folder = checkpoint.newest(out)
    make_old(folder, **{"fusion.query_M": weights_of(folder)["fusion.query_M"] * torch.nan})
    for use in (load_run, lambda run: train(plain, samples, tokens, run, resume=True, quiet=True)):
        with pytest.raises(NonFiniteError, match=r"no checkpoint of .* has finite weights"):
            use(out)


def test_the_decision_on_the_device_is_that_of_the_host(tmp_path, plain, samples, source_with, monkeypatch):
    """AdamW's own skipping, which one GPU uses; the kernel of the CPU knows it too."""
    train(plain, samples, source_with(5), tmp_path / "host", quiet=True)
    monkeypatch.setattr("trainer.loop.distributed.decides_on_device", lambda accelerator: True)
    result = train(replace(plain, log_every=4), samples, source_with(5), tmp_path / "device", stop_at=5, quiet=True)
    result = train(replace(plain, log_every=4), samples, source_with(5), tmp_path / "device", resume=True, quiet=True)
    host, device = (read_metrics(tmp_path / run) for run in ("host", "device"))
    assert [row["skipped"] for row in device] == [row["skipped"] for row in host]
    assert result.skipped == sum(row["skipped"] for row in host) > 0
    losses = [[row["loss"] for row in rows if not row["skipped"]] for rows in (host, device)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, other = (
        load_file(checkpoint.newest(tmp_path / run) / checkpoint.OPTIMIZER_FILE) for run in ("host", "device")
    )
    steps = [{name: value.item() for name, value in found.items() if name.endswith("/step")} for found in (one, other)]
    assert steps[0] == steps[1]
    with pytest.raises(NonFiniteError, match=r"the output of projectors\.1"):
        train(replace(plain, max_skipped_in_row=3), samples, source_with(*range(18)), tmp_path / "all", quiet=True)


@pytest.fixture
def odd_word(tmp_path, make_question_store, make_sample):
    """A store with one sample about a word that an LLM does not know, and an LLM whose <unk> is infinite."""
    store = make_question_store(tmp_path / "features/toy.zarr")
    asked = make_sample(4)
    unknown = replace(asked, sample_id="odd", turns=(asked.turns[0], Turn(role="gpt", text="mauve")), options=())
    writer = StoreWriter.open(store)
    writer.add_samples("toy-odd", [unknown])
    writer.publish_snapshot()
    torch.manual_seed(11)
    llm = load_llm("fresh:mini", texts=["In: What colour is it? Out: red green blue"])
    with torch.no_grad():
        llm.model.get_input_embeddings().weight[0] = torch.inf
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    settings = {"projector": {"grid": [2, 2, 2]}, "max_steps": 4, "batch_size": 6, "micro_batch_size": 3}
    (tmp_path / "small.yaml").write_text(json.dumps({**settings, "precision": "fp32", "train_llm": "none"}))
    return [
        *("--from-cache", str(store), "--recipe", "demo", "--config", str(tmp_path / "small.yaml")),
        *("--llm", str(tmp_path / "llm"), "--out", str(tmp_path / "run")),
    ]


def test_the_last_line_and_the_exit_code_say_that_a_step_was_skipped(tmp_path, odd_word):
    done = CliRunner().invoke(train_main, odd_word)
    assert done.exit_code == EXIT_WITH_FAILURES == 3, done.output
    lines = done.stdout.splitlines()
    assert "step 4 of 4, loss" in lines[-2]
    assert lines[-1].startswith(f"{tmp_path / 'run'}: 1 step of 4 changed nothing")
    again = CliRunner().invoke(train_main, [*odd_word, "--resume", "auto", "--json"])
    assert (again.exit_code, json.loads(again.stdout)["skipped"]) == (3, 1)


def test_launched_processes_end_with_the_exit_code_of_one(tmp_path, odd_word):
    """torch's launcher would make 1 of it, and end the other process as if one had crashed."""
    program = str(Path(sys.executable).with_name("merv-train"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [program, *odd_word, "--launch", "ddp", "--processes", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == EXIT_WITH_FAILURES, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'run'}: 1 step of 4 changed nothing")
    assert "Traceback" not in done.stderr


def test_a_run_that_only_skips_ends_with_an_error(tmp_path, odd_word):
    (tmp_path / "small.yaml").write_text(
        json.dumps({"max_skipped_in_row": 1, **json.loads((tmp_path / "small.yaml").read_text())})
    )
    done = CliRunner().invoke(train_main, odd_word)
    assert done.exit_code == 1
    assert "the output of llm.model.embed_tokens" in done.stderr.replace("\n", " ")
