"""A run that has learned the colours of films by heart is asked about files it is given by name."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner

import trainer
from mervcache.errors import UserError
from trainer import cli_eval
from trainer.ask import Asker, parse_clip
from trainer.cli_eval import eval_main, parse_span
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.data.collate import make_batch
from trainer.data.tokens import TokenShape
from trainer.end_to_end import source_like
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.load import load_run
from trainer.runs.run_record import RunRecord
from trainer.sources import open_store

pytestmark = pytest.mark.slow

QUESTION = "What colour is it?"
CONFIG = TrainConfig(
    llm="fresh:mini",
    train_llm="full",
    projector=ProjectorConfig(standardise=True),
    optimizer=OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, warmup_ratio=0.1),
    batch_size=7,
    micro_batch_size=7,
    max_steps=60,
    precision="fp32",
    checkpoint_every=100,
)


def trained(config, store, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=64))
        samples, source = open_store(str(store), config)
        train(config, samples, source, out, store=str(store), quiet=True)
    return out


@pytest.fixture(scope="module")
def run(extracted, tmp_path_factory):
    """Trained from the store, which the run is asked without."""
    torch.set_num_threads(1)
    return trained(CONFIG, extracted, tmp_path_factory.mktemp("runs") / "colours")


@pytest.fixture(scope="module")
def asker(run):
    with Asker(run) as opened:
        yield opened


def ask(*arguments, **options):
    return CliRunner().invoke(eval_main, ["ask", *map(str, arguments)], **options)


def test_a_run_says_the_colours_of_videos_and_images(asker, media_lab, media_root):
    assert asker.looks
    for path, colour in media_lab.VIDEOS.items():
        assert asker.answer(QUESTION, video=media_root / path) == colour
    for path, colour in media_lab.IMAGES.items():
        assert asker.answer(QUESTION, image=str(media_root / path)) == colour


def test_it_prints_as_one_line_with_its_run_and_device(asker, extracted):
    assert re.fullmatch(rf"<Asker of <LoadedRun .* step 60, .*{re.escape(str(extracted))}> on (cpu|cuda)>", repr(asker))


def test_a_file_with_a_known_name_in_another_folder_is_another_file(asker, media_root, tmp_path):
    shutil.copy(media_root / "films/blue.mp4", tmp_path / "red.mp4")
    assert asker.answer(QUESTION, video=media_root / "films/red.mp4") == "red"
    assert asker.answer(QUESTION, video=tmp_path / "red.mp4") == "blue"


def test_a_span_and_a_folder_of_frames_are_videos_too(asker, media_root, media_lab, tmp_path):
    assert asker.answer(QUESTION, video=media_root / "films/green.mp4", span=(1.0, None)) == "green"
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(4):
        shutil.copy(media_root / "pictures/blue.png", frames / f"frame_{number}.png")
    assert asker.answer(QUESTION, video=frames) == "blue"


def test_several_questions_look_once(asker, media_root):
    video = media_root / "films/white.mp4"
    projected = []
    hook = asker.model.projectors[0].register_forward_pre_hook(lambda _, inputs: projected.append(len(inputs[0])))
    assert asker.answers([QUESTION, QUESTION], video=video) == ["white", "white"]
    hook.remove()
    assert projected == [1]  # one clip, once
    assert asker.answers([QUESTION], video=video, max_new_tokens=1) == ["white"]


def test_what_cannot_be_asked_is_said(asker, media_root, media_lab):
    video = media_root / "films/red.mp4"
    with pytest.raises(UserError, match="give one video or one image"):
        asker.answer(QUESTION)
    with pytest.raises(UserError, match="give one video or one image"):
        asker.answer(QUESTION, video=video, image=video)
    with pytest.raises(UserError, match=r"there is no file nowhere\.mp4;"):
        asker.answer(QUESTION, video="nowhere.mp4")
    broken = media_root / media_lab.BROKEN
    with pytest.raises(UserError, match=rf"^{re.escape(str(broken))} cannot be decoded: "):
        asker.answer(QUESTION, video=broken)
    with pytest.raises(UserError, match="the question is empty"):
        asker.answer("  ", video=video)
    with pytest.raises(UserError, match="context of 64"):
        asker.answer("colour " * 80, video=video)
    with pytest.raises(UserError, match="an image has none"):
        parse_clip(None, media_root / "pictures/red.png", (1.0, None))


def test_a_file_that_is_not_there_is_said_before_the_run_is_loaded(tmp_path):
    result = ask("--checkpoint", tmp_path / "unread", "--video", "films/nowhere.mp4", QUESTION)
    assert result.exit_code == 1
    assert "there is no file films/nowhere.mp4;" in result.stderr


def test_one_answer_is_printed_alone(run, media_root):
    film = media_root / "films/red.mp4"
    assert ask("--checkpoint", run, "--video", film, QUESTION).stdout == "red\n"


def test_a_medium_that_is_missing_is_said_before_the_run_is_loaded(run, tmp_path):
    unreadable = shutil.copytree(run, tmp_path / "run")
    for file in unreadable.glob("checkpoints/*/state.json"):
        file.unlink()  # loading it would be an error of its own
    result = ask("--checkpoint", unreadable, QUESTION)
    assert result.exit_code == 1
    assert "give one video with --video or one image with --image" in result.stderr


def test_other_weights_are_refused_with_the_field_that_differs(run, media_root):
    with (
        Asker(run, weights=["dinov2=random:1"]) as other,
        pytest.raises(UserError, match=r"dinov2 is not the encoder .*weights_sha256: .*--weights dinov2=FOLDER"),
    ):
        other.answer(QUESTION, video=media_root / "films/red.mp4")


@pytest.mark.parametrize(("rule", "steps"), [("linspace-16", 16), ("linspace-32/2", 16), ("linspace-8", 8)])
def test_an_import_is_shown_the_frames_it_was_trained_on(run, rule, steps):
    loaded = load_run(run)
    published = TokenShape(grid=(steps, 8, 8), width=768, is_pooled=True, identity="unbound:siglip")
    record = replace(loaded.record, shapes={"siglip": published}, encoders={})
    options = {"trained": {}, "weights": ["random:0"], "device": "cpu"}
    wanted = {"frame_rule": rule, "preprocessing.fit": "squash"}
    with source_like(loaded.built.config, replace(record, wanted={"siglip": wanted}), **options) as source:
        assert source.facts["siglip"]["identity"]["frame_rule"] == rule
    cropped = replace(record, wanted={"siglip": {**wanted, "preprocessing.fit": "centre-crop"}})
    message = r"siglip tokens of preprocessing\.fit centre-crop, this source has squash"
    with pytest.raises(UserError, match=message), source_like(loaded.built.config, cropped, **options):
        pass


def test_a_text_only_run_answers_without_looking_and_says_so(extracted, tmp_path):
    words = trained(replace(CONFIG, mode="text-only", max_steps=20), extracted, tmp_path / "words")
    result = ask("--checkpoint", words, "--json", QUESTION)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["looked"] is False
    assert told["answers"][0]["question"] == QUESTION
    assert told["answers"][0]["answer"] in ("red", "green", "blue", "white")
    assert "answers without looking" in result.stderr


def test_a_run_with_visual_tokens_at_the_placeholder_answers(extracted, tmp_path, media_lab, media_root):
    placed = trained(replace(CONFIG, visual_position="placeholder"), extracted, tmp_path / "placed")
    with Asker(placed) as opened:
        for path, colour in media_lab.VIDEOS.items():
            assert opened.answers([QUESTION, f"<video>\n{QUESTION}"], video=media_root / path) == [colour, colour]


def test_the_command_answers_and_labels_random_weights(run, media_root):
    result = ask("--checkpoint", run, "--video", media_root / "films/green.mp4", QUESTION, QUESTION)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Q: {QUESTION}\nA: green\n\nQ: {QUESTION}\nA: green\n"
    assert "random weights: languagebind, dinov2, vivit, siglip" in result.stderr
    result = ask("--checkpoint", run, "--image", media_root / "pictures/red.png", "--json", QUESTION)
    told = json.loads(result.stdout)
    assert told["answers"] == [{"question": QUESTION, "answer": "red"}]
    assert told["looked"] is True


def test_without_a_question_a_terminal_is_asked_and_a_pipe_is_an_error(run, media_root, monkeypatch):
    command = ("--checkpoint", run, "--video", media_root / "films/red.mp4")
    refused = ask(*command)
    assert refused.exit_code == 1
    assert "what is the question?" in refused.stderr

    monkeypatch.setattr(cli_eval, "is_terminal", lambda: True)
    answered = ask(*command, input=f"{QUESTION}\n{QUESTION}\n\n")
    assert answered.exit_code == 0, answered.output
    assert answered.stdout == "red\nred\n"


@pytest.mark.parametrize(
    ("text", "span"), [(None, (None, None)), ("1.5,4", (1.5, 4.0)), (",4", (None, 4.0)), ("2, ", (2.0, None))]
)
def test_spans_are_seconds(text, span):
    assert parse_span(text) == span


@pytest.mark.parametrize("text", ["1", "a,b", "1,2,3"])
def test_a_span_that_is_none_says_how_one_looks(text):
    with pytest.raises(UserError, match=r"such as 1\.5,4"):
        parse_span(text)


def test_the_two_names_of_the_room_are_found_and_no_other():
    assert trainer.Asker is Asker
    assert callable(trainer.load_run)
    with pytest.raises(AttributeError, match="no attribute 'ask_me'"):
        trainer.ask_me  # noqa: B018


def test_a_run_that_trained_an_encoder_end_to_end_answers(tmp_path, media_lab, media_root, extracted):
    """From the first command to the answer: the settings of the extraction stand in a file."""
    from trainer.cli import train_main

    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(media_lab.settings(media_root)))
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(
            {
                "llm": "fresh:tiny",
                "train_llm": "full",
                "train_encoders": ["siglip"],
                "precision": "fp32",
                "batch_size": 7,
                "micro_batch_size": 7,
                "max_steps": 40,
                "projector": {"standardise": True},
                "optimizer": {"projector_lr": 2e-3, "fusion_lr": 2e-3, "llm_lr": 2e-3, "encoder_lr": 1e-4},
            }
        )
    )
    out = tmp_path / "run"
    command = [
        *("--end-to-end", "--extract-config", tmp_path / "extract.yaml", "--encoders", "siglip,dinov2"),
        *("--config", tmp_path / "train.yaml", "--out", out, "--json"),
    ]
    result = CliRunner().invoke(train_main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    record = RunRecord.read(out)
    assert (record.tokens, record.live["encoders"]) == ("end to end", ["siglip", "dinov2"])
    result = CliRunner().invoke(train_main, ["--resume", str(out), "--json"])  # needs nothing but the run
    assert json.loads(result.stdout)["steps"] == 40, result.output
    result = ask("--checkpoint", out, "--image", media_root / "pictures/blue.png", QUESTION)
    assert result.stdout == "blue\n", result.output
    refused = CliRunner().invoke(eval_main, ["run", "--checkpoint", str(out), "--store", str(extracted)])
    assert "also trained siglip, so no store holds their tokens" in refused.stderr


def test_a_run_answers_in_its_own_precision_and_looks_in_that_of_its_encoders(run, media_root, monkeypatch):
    loaded = load_run(run)
    half = replace(loaded.built, config=replace(loaded.built.config, precision="bf16"))
    looking, answering = [], []
    monkeypatch.setattr(
        "trainer.ask.make_batch",
        lambda *parts: looking.append(torch.is_autocast_enabled("cpu")) or make_batch(*parts),
    )
    with Asker(replace(loaded, built=half)) as asker:
        asker.model.llm.register_forward_pre_hook(lambda *_: answering.append(torch.is_autocast_enabled("cpu")))
        assert asker.answer(QUESTION, video=media_root / "films/red.mp4") == "red"
    assert looking == [False]
    assert set(answering) == {True}
