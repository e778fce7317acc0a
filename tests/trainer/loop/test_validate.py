from dataclasses import replace

import pytest
import torch

from featurestore import FeatureStore
from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.data.tokens import MemoryTokens, StoreTokens
from trainer.loop.distributed import make_accelerator
from trainer.loop.plan import Validation, heldout_samples, make_plan, modality
from trainer.loop.train import train
from trainer.model.multiple_choice import answer_all, summarise
from trainer.runs import checkpoint
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def heldout(make_sample):
    """Six questions about known clips and one text, none of them trained on."""
    shown = [make_sample(index, clip_id=f"set/clip{index - 100}.mp4", split="heldout") for index in range(100, 106)]
    return [*shown, make_sample(106, clip_id=None, split="heldout")]


@pytest.fixture
def validated(config):
    return replace(config, eval_every=2, checkpoint_every=100)


class Stills(MemoryTokens):
    """Of which two clips are images."""

    def stills(self, clip_ids):
        return {"set/clip0.mp4", "set/clip1.mp4"}.intersection(clip_ids)


@pytest.fixture
def mixed(samples, tokens):
    ids = [sample.clip_id for sample in samples]
    return Stills(ids, tokens.fetch(ids))


def test_metrics_equal_those_of_single_samples(tmp_path, validated, samples, heldout, mixed):
    plan = make_plan(validated, [*samples, *heldout], mixed)
    found = Validation(plan, [*samples, *heldout], mixed, make_accelerator(validated, tmp_path))()
    model, losses, counts = plan.built.model.eval(), {}, {}
    for sample in heldout:
        rendered = plan.built.renderer(sample.turns, has_clip=sample.clip_id is not None)
        kind = modality(sample, mixed.stills([sample.clip_id]))
        text = model.llm.get_input_embeddings().weight[list(rendered.input_ids)]
        visual = text[:0]
        if sample.clip_id is not None:
            visual = model.visual_tokens(mixed.fetch([sample.clip_id]))[0][0]
        logs = model.llm(inputs_embeds=torch.cat([text[:1], visual, text[1:]])[None]).logits[0].log_softmax(-1)
        for place, label in enumerate(rendered.labels):
            if label >= 0:
                losses[kind] = losses.get(kind, 0.0) - logs[place + len(visual) - 1, label].item()
                counts[kind] = counts.get(kind, 0) + 1
    assert counts == {"image": 4, "video": 8, "text": 2}  # a colour and an end token each
    for kind in counts:
        assert found[f"val_loss_{kind}"] == pytest.approx(losses[kind] / counts[kind], rel=1e-4)
    assert found["val_loss"] == pytest.approx(sum(losses.values()) / 14, rel=1e-4)
    overall = summarise(list(answer_all(plan.built, heldout, mixed)))[0]
    assert (found["val_accuracy"], found["val_chance"]) == pytest.approx((overall.accuracy, 1 / 3))


@pytest.mark.parametrize("num_ranks", [2, 3, 9])
def test_shares_of_ranks_add_up_to_all_in_as_many_forwards_each(
    tmp_path, validated, samples, heldout, mixed, num_ranks
):
    class Rank:
        """Stands for one process of several; sums are added by the test."""

        num_processes, device = num_ranks, torch.device("cpu")

        def __init__(self, index, total=None):
            self.process_index, self.total, self.sums, self.forwards = index, total, None, 0

        def count(self, *_):
            self.forwards += 1

        def reduce(self, sums, how):
            self.sums = sums
            return sums if self.total is None else self.total

    settings = replace(validated, micro_batch_size=2)
    everything = [*samples, *heldout]
    plan = make_plan(settings, everything, mixed)
    ranks = [Rank(index) for index in range(num_ranks)]
    for rank in ranks:
        hook = plan.built.model.llm.register_forward_pre_hook(rank.count)
        Validation(plan, everything, mixed, rank)()
        hook.remove()
    assert len({rank.forwards for rank in ranks}) == 1
    together = Validation(plan, everything, mixed, Rank(0, total=sum(rank.sums for rank in ranks)))
    alone = Validation(plan, everything, mixed, make_accelerator(settings, tmp_path))
    assert together() == pytest.approx(alone(), rel=1e-5)


def test_rows_hold_validation_metrics_and_the_best_checkpoint_is_kept_besides_the_last(
    tmp_path, validated, samples, heldout, tokens
):
    settings = replace(validated, max_steps=12, keep_checkpoints=1, log_every=5)
    result = train(settings, [*samples, *heldout], tokens, tmp_path / "run", quiet=True)
    rows = {row["step"] + 1: row for row in read_metrics(tmp_path / "run")}
    scored = {step: row for step, row in rows.items() if "val_loss" in row}
    assert list(scored) == [2, 4, 6, 8, 10, 12]
    by_hand = max(scored, key=lambda step: (scored[step]["val_accuracy"], -scored[step]["val_loss"]))
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "run")]
    assert kept == sorted({f"step-{by_hand:08d}", "step-00000012"})
    assert result.best.endswith(f"step-{by_hand:08d}")
    assert load_run(tmp_path / "run", best=True).step == by_hand
    assert load_run(tmp_path / "run").step == 12
    assert checkpoint.load_state(checkpoint.best(tmp_path / "run")).validation == pytest.approx(
        {name: value for name, value in scored[by_hand].items() if name.startswith("val_")}
    )


def test_validation_changes_no_loss_and_a_resumed_run_remembers_its_best(
    tmp_path, config, validated, samples, heldout, tokens
):
    everything = [*samples, *heldout]
    train(config, everything, tokens, tmp_path / "without", quiet=True)
    train(validated, everything, tokens, tmp_path / "with", quiet=True)
    train(validated, everything, tokens, tmp_path / "parts", stop_at=3, quiet=True)
    result = train(validated, everything, tokens, tmp_path / "parts", resume=True, quiet=True)
    without, whole, parts = (read_metrics(tmp_path / name) for name in ("without", "with", "parts"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in without]
    for name in ("loss", "val_loss", "val_accuracy"):
        assert [row.get(name) for row in parts] == [row.get(name) for row in whole]
    assert result.best.endswith(checkpoint.best(tmp_path / "with").name)


def test_the_best_is_the_most_accurate_then_the_one_of_smaller_loss_then_the_first(tmp_path):
    def save(step, **validation):
        checkpoint.save(
            tmp_path, step=step, weights={}, optimizer={}, data_digest="", identities={}, keep=1, validation=validation
        )

    assert checkpoint.best(tmp_path) is None
    save(1)
    assert checkpoint.best(tmp_path) is None
    best = []
    for step, accuracy, loss in [(2, 0.5, 1.0), (3, 0.6, 2.0), (4, 0.6, 1.5), (5, 0.6, 1.5), (6, 0.4, 0.1)]:
        save(step, val_accuracy=accuracy, val_loss=loss)
        best.append(int(checkpoint.best(tmp_path).name[-1]))
    assert best == [2, 3, 4, 4, 4]
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["4", "6"]


def test_a_run_that_was_not_validated_has_no_best(tmp_path, config, samples, tokens):
    train(replace(config, max_steps=1), samples, tokens, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="was validated: train with --eval-every, or leave out --best"):
        load_run(tmp_path / "run", best=True)


def test_the_same_samples_are_held_out_whatever_their_order_and_text_only_if_it_can_change(
    validated, samples, heldout, tokens
):
    everything = [*samples, *heldout]
    chosen = heldout_samples(everything, tokens, validated, has_visual=True)
    assert chosen == heldout_samples(everything[::-1], tokens, validated, has_visual=True)
    assert {sample.sample_id for sample in chosen} == {sample.sample_id for sample in heldout}
    frozen = replace(validated, train_llm="none", allow_fresh_frozen=True)
    assert None not in {s.clip_id for s in heldout_samples(everything, tokens, frozen, has_visual=True)}


def test_nothing_held_out_is_an_error_before_the_first_step(tmp_path, validated, samples, tokens):
    with pytest.raises(UserError, match="no sample of split 'heldout' has tokens; splits found: train"):
        train(validated, samples, tokens, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_trained_on_is_not_validated_on(config):
    with pytest.raises(UserError, match="eval_split must not be what is trained on, split 'train'"):
        replace(config, eval_every=2, eval_split="train")


def test_a_store_distinguishes_images_from_videos(store: FeatureStore):
    source = StoreTokens(store, ["dinov2"])
    assert source.stills({"set/clip0.mp4", "set/still.jpg"}) == {"set/still.jpg"}


@pytest.fixture
def captioned(validated):
    return replace(validated, stage="align", prompt="caption")


def as_caption(sample):
    return replace(sample, sample_id=f"c-{sample.sample_id}", stage="align", options=(), answer_index=None)


def test_where_no_question_is_shown_captions_are_held_out_and_no_options_are_scored(
    tmp_path, captioned, samples, heldout, mixed
):
    everything = [*map(as_caption, samples), *map(as_caption, heldout[:3]), *heldout]
    plan = make_plan(captioned, everything, mixed)
    validation = Validation(plan, everything, mixed, make_accelerator(captioned, tmp_path))
    assert {sample.sample_id for sample in validation.samples} == {f"c-{sample.sample_id}" for sample in heldout[:3]}
    assert set(validation()) == {"val_loss", "val_loss_image", "val_loss_video"}


def test_a_stage_without_held_out_captions_is_trained_unvalidated_with_a_message(
    tmp_path, captioned, samples, heldout, tokens, caplog
):
    everything = [*map(as_caption, samples), *heldout]
    with caplog.at_level("INFO", "trainer"):
        result = train(replace(captioned, max_steps=2), everything, tokens, tmp_path / "run", quiet=True)
    assert "no caption of split 'heldout': stage align is not validated" in caplog.messages
    assert (result.steps, result.best) == (2, "")
    assert not any("val_loss" in row for row in read_metrics(tmp_path / "run"))


def test_questions_whose_options_would_be_cut_off_are_left_out(tmp_path, validated, samples, heldout, tokens):
    long = replace(heldout[0], turns=(Turn(role="human", text="What? " * 70), heldout[0].turns[1]))
    everything = [*samples, long, *heldout[1:]]
    plan = make_plan(validated, everything, tokens)
    validation = Validation(plan, everything, tokens, make_accelerator(validated, tmp_path))
    assert len(validation.samples) == 7
    assert {sample.sample_id for sample in validation.questions} == {sample.sample_id for sample in heldout[1:]}
    assert 0 <= validation()["val_accuracy"] <= 1
