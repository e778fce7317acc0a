"""Questions answered without a store: by encoders that run now, those that a run has trained among them."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from featurestore import FeatureIdentity, FeatureStore
from mervcache.errors import UserError
from pipeline.config import EncoderSettings
from pipeline.config import read_config as read_extract_config
from pipeline.encoders.network import build_network
from pipeline.extract import extract
from trainer.cli_eval import eval_main
from trainer.config import OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.end_to_end import live_source
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs import checkpoint
from trainer.runs.export import export_run
from trainer.runs.load import load_run
from trainer.runs.run_record import read_scores
from trainer.sources import open_store

pytestmark = pytest.mark.slow

FILMS = {"one": "red", "two": "green", "three": "blue"}  # name of a film -> its colour
OPTIONS = ["red", "green", "blue", "white"]
CONFIG = TrainConfig(
    llm="fresh:mini",
    train_llm="full",
    encoders=("dinov2", "siglip"),
    train_encoders=("siglip",),
    projector=ProjectorConfig(standardise=True),
    optimizer=OptimizerConfig(projector_lr=3e-3, fusion_lr=3e-3, llm_lr=3e-3, encoder_lr=1e-3, warmup_ratio=0.0),
    batch_size=7,
    micro_batch_size=7,
    max_steps=4,
    precision="fp32",
)


@pytest.fixture(scope="module")
def quiz(media_lab, media_root, tmp_path_factory):
    """A benchmark of three films and a picture, and a question about a film that is broken."""
    root = tmp_path_factory.mktemp("quiz")
    videos = root / "Colours/videos"
    videos.mkdir(parents=True)
    for name, colour in FILMS.items():
        shutil.copy(media_root / f"films/{colour}.mp4", videos / f"{name}.mp4")
    shutil.copy(media_root / "pictures/blue.png", videos / "still.png")
    shutil.copy(media_root / media_lab.BROKEN, videos / "broken.mp4")
    colours = {**FILMS, "still": "blue", "broken": "red"}
    rows = [
        {"question_id": name, "video_name": name, "question": "What colour is it?", "options": OPTIONS}
        for name in colours
    ]
    answers = [{"question_id": name, "answer": c, "answer_id": OPTIONS.index(c)} for name, c in colours.items()]
    (root / "Colours/test_q.json").write_text(json.dumps(rows))
    (root / "Colours/test_a.json").write_text(json.dumps(answers))
    return root


@pytest.fixture(scope="module")
def small():
    """`fresh:mini` with room for the visual tokens, for the runs that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=256))
        yield


@pytest.fixture(scope="module")
def run(small, media_lab, media_root, tmp_path_factory):
    """A run that has trained SigLIP along, with a rate that changes it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "live"
    with live_source(CONFIG, media_lab.settings(media_root)) as (samples, source):
        train(CONFIG, samples, source, out, quiet=True)
    return out


def score(*arguments):
    return CliRunner().invoke(eval_main, ["run", *(str(argument) for argument in arguments)])


@torch.no_grad()
def plain_scores(run, samples, tokens, frames):
    """Mean log-likelihood of every option, from the checkpoint's tensors, a sample at a time, without a batch."""
    loaded = load_run(run)
    model, tokenizer = loaded.built.model, loaded.built.renderer.tokenizer
    identity = FeatureIdentity.from_dict(loaded.record.encoders["siglip"]["identity"])
    network = build_network(EncoderSettings.of_identity(identity, "random:0").spec)
    prefix = "trained_encoders.0.network."
    weights = load_file(checkpoint.newest(run) / checkpoint.MODEL_FILE)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    network.load_state_dict(own, assign=True)
    network.finish()
    found = {}
    for sample in samples:
        pixels_BTCHW = (frames[sample.clip_id][None].permute(0, 1, 4, 2, 3) / 255 - 0.5) / 0.5
        features_BTHWD = network.eval()(pixels_BTCHW)[0]
        pooled_BDTHW = torch.nn.functional.adaptive_avg_pool3d(features_BTHWD.permute(0, 4, 1, 2, 3), (4, 2, 2))
        siglip = model.projectors[1](pooled_BDTHW.permute(0, 2, 3, 4, 1))
        dinov2 = model.projectors[0](tokens[sample.clip_id][None])
        visual_NM = model.fusion([dinov2, siglip])[0][0]
        scores = []
        for option in sample.options:
            prompt = tokenizer(f"In: {sample.turns[0].text}\nOut:")["input_ids"]
            answer = [*tokenizer(option, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            text = model.llm.get_input_embeddings().weight[[*prompt, *answer]]
            logs = model.llm(inputs_embeds=torch.cat([text[:1], visual_NM, text[1:]])[None]).logits[0].log_softmax(-1)
            places = range(len(visual_NM) + len(prompt) - 1, len(visual_NM) + len(prompt) + len(answer) - 1)
            scores.append(np.mean([logs[place, token].item() for place, token in zip(places, answer, strict=True)]))
        found[sample.sample_id] = scores
    return found


def test_a_trained_encoder_answers_by_its_weights(run, quiz, media_lab):
    """Frames and the frozen encoder's tokens by the source that a run trains on, which other tests hold to a store."""
    result = evaluate_run(run, EvaluationRequest(dataset="eval", root=str(quiz), batch_size=3))
    assert [row["sample_id"].rpartition("/")[2] for row in result["answers"]] == ["one", "two", "three", "still"]
    settings = {**media_lab.settings(quiz), "dataset": "eval"}
    with live_source(CONFIG, settings) as (samples, source):
        shown = [sample for sample in samples if "broken" not in sample.sample_id]
        fetched = {sample.clip_id: source.fetch([sample.clip_id]) for sample in shown}
    tokens = {clip_id: each["dinov2"][0].float() for clip_id, each in fetched.items()}
    wanted = plain_scores(run, shown, tokens, {clip_id: each["siglip"][0] for clip_id, each in fetched.items()})
    for row in result["answers"]:
        assert row["scores"] == pytest.approx(wanted[row["sample_id"]], abs=1e-4), row["sample_id"]
        assert row["predicted"] == int(np.argmax(wanted[row["sample_id"]]))
    assert len({row["scores"] for row in result["answers"]}) == 4  # it does look


def test_the_scores_are_kept_with_what_they_were_measured_on(run, quiz):
    result = score("--checkpoint", run, "--dataset", "eval", "--root", quiz, "--json")
    assert result.exit_code == 3, result.output  # the question about the broken film is lost
    assert json.loads(result.stdout)["questions"] == {"Colours": {"scored": 4, "without tokens of their clips": 1}}
    (record,) = read_scores(run)
    assert record["scores"] == json.loads(result.stdout)["scores"]
    assert (record["store"], record["split"]) == ("eval", "heldout")
    assert record["snapshot"].startswith("live-")


def test_the_datasets_options_decide_which_questions_are_asked(run, quiz, tmp_path):
    shutil.copytree(quiz, tmp_path / "both")
    shutil.copytree(quiz / "Colours", tmp_path / "both" / "Shades")
    place = ("--checkpoint", run, "--dataset", "eval", "--root", tmp_path / "both", "--json")
    one = score(*place, "--option", "benchmarks=Shades")
    assert one.exit_code == 3, one.output  # the broken film
    assert list(json.loads(one.stdout)["questions"]) == ["Shades"]
    assert list(json.loads(score(*place).stdout)["questions"]) == ["Colours", "Shades"]
    unknown = score(*place, "--option", "benchmark=Shades")
    assert unknown.exit_code == 1
    assert "dataset eval has no option benchmark; its options are: benchmarks" in unknown.output


def test_an_export_answers_as_its_run_and_its_card_names_the_command(run, quiz, tmp_path):
    export_run(run, tmp_path / "given")
    command = "merv-eval run --checkpoint path/to/this/folder --dataset NAME --root DIR"
    assert command in (tmp_path / "given/README.md").read_text()
    by_run, by_export = (
        evaluate_run(path, EvaluationRequest(dataset="eval", root=str(quiz))) for path in (run, tmp_path / "given")
    )
    for by_the_export, by_the_run in zip(by_export["answers"], by_run["answers"], strict=True):
        assert by_the_export["scores"] == pytest.approx(by_the_run["scores"], abs=1e-4)


def test_without_a_dataset_it_is_the_one_of_the_training(run):
    refused = score("--checkpoint", run)
    assert refused.exit_code == 1
    assert "no multiple-choice question of split 'heldout'" in refused.stderr


def test_a_run_from_a_store_may_be_scored_live_and_has_the_scores_of_the_store(
    small, tmp_path, media_lab, media_root, extracted, quiz
):
    """To rounding: such a run does not know the batch shape of the extraction."""
    config = TrainConfig(**{**CONFIG.__dict__, "train_encoders": (), "max_steps": 2})
    samples, source = open_store(str(extracted), config)
    train(config, samples, source, tmp_path / "run", store=str(extracted), quiet=True)
    store = tmp_path / "quiz.zarr"
    extract(read_extract_config(None, {**media_lab.settings(quiz, store=str(store)), "dataset": "eval"}), quiet=True)
    assert len(FeatureStore.open(store).clips) == 5
    from_store = evaluate_run(tmp_path / "run", EvaluationRequest(store=str(store)))
    live = evaluate_run(tmp_path / "run", EvaluationRequest(dataset="eval", root=str(quiz)))
    assert [row["sample_id"] for row in live["answers"]] == [row["sample_id"] for row in from_store["answers"]]
    for now, then in zip(live["answers"], from_store["answers"], strict=True):
        assert now["scores"] == pytest.approx(then["scores"], abs=1e-4)


def test_baselines_are_scored_on_the_same_questions(run, small, tmp_path, media_lab, media_root, extracted, quiz):
    words = TrainConfig(**{**CONFIG.__dict__, "train_encoders": (), "mode": "text-only", "max_steps": 1})
    with live_source(words, media_lab.settings(media_root)) as (samples, source):
        train(words, samples, source, tmp_path / "words", quiet=True)
    cached = TrainConfig(**{**CONFIG.__dict__, "train_encoders": (), "max_steps": 1})
    samples, source = open_store(str(extracted), cached)
    train(cached, samples, source, tmp_path / "cached", store=str(extracted), quiet=True)
    others = [tmp_path / "words", tmp_path / "cached"]
    result = evaluate_run(run, EvaluationRequest(dataset="eval", root=str(quiz)), others)
    assert [rows[0]["questions"] for rows in result["beside"].values()] == [4, 4]
    alone = evaluate_run(others[0], EvaluationRequest(dataset="eval", root=str(quiz)))
    assert alone["scores"] != []


def test_two_places_and_none_are_errors(run, small, tmp_path, extracted, quiz):
    with pytest.raises(UserError, match="give --store or --dataset, --root, not both"):
        evaluate_run(run, EvaluationRequest(store=str(extracted), dataset="eval", root=str(quiz)))
    with pytest.raises(UserError, match="give --store or --option, not both"):
        evaluate_run(run, EvaluationRequest(store=str(extracted), options={"benchmarks": "Colours"}))
    with pytest.raises(UserError, match=r"also trained siglip, .*without --store"):
        evaluate_run(run, EvaluationRequest(store=str(extracted)))
    record = json.loads((run / "run.json").read_text())
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    (lost / "run.json").write_text(json.dumps({**record, "live": None}))
    path = checkpoint.newest(lost) / checkpoint.STATE_FILE  # an earlier version's, which kept no digest of the record
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in state.items() if name not in ("files", "digest")}))
    with pytest.raises(UserError, match=r"names no store of its own; .* or --dataset and --root"):
        evaluate_run(lost, EvaluationRequest())
