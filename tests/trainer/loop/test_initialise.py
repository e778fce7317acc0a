import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mervcache.errors import StoreDamagedError, UserError
from trainer.config import FusionConfig, LoraConfig
from trainer.data.tokens import MemoryTokens
from trainer.loop.plan import fit_standardisation, make_plan
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs import checkpoint
from trainer.runs.export import export_run
from trainer.runs.load import load_run
from trainer.runs.run_record import RunRecord


def weights_of(run):
    return load_run(run).built.model.state_dict()


def run_to_end(config, samples, tokens, out, **options):
    return train(config, samples, tokens, out, quiet=True, **options)


@pytest.fixture
def short(config):
    return replace(config, max_steps=2)


@pytest.fixture
def origin(tmp_path, short, samples, tokens):
    """A finished run of two steps."""
    run_to_end(short, samples, tokens, tmp_path / "origin")
    return tmp_path / "origin"


def test_a_run_starts_from_all_weights_and_constants_of_the_same_model(origin, short, samples, tokens, caplog):
    caplog.set_level("INFO", "trainer")
    plan = make_plan(replace(short, init=str(origin)), samples, tokens)
    fit_standardisation(plan, tokens)
    before = weights_of(origin)
    assert set(plan.built.model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in plan.built.model.state_dict().items())
    message = f"weights of {origin} (step 2 of 2): loaded projector dinov2, projector vivit, fusion, LLM"
    assert plan.record.started_from == message
    assert message in caplog.messages


def test_a_run_that_has_begun_does_not_need_its_start_again(tmp_path, origin, short, samples, tokens):
    config = replace(short, init=str(origin))
    run_to_end(config, samples, tokens, tmp_path / "whole")
    run_to_end(config, samples, tokens, tmp_path / "parts", stop_at=1)
    shutil.rmtree(origin)
    run_to_end(config, samples, tokens, tmp_path / "parts", resume=True)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.fixture
def turned_tokens(samples, tokens):
    """The same tokens from a source with the encoders in the other order."""
    ids = [sample.clip_id for sample in samples]
    return MemoryTokens(ids, dict(reversed(tokens.fetch(ids).items())))


def test_projectors_are_known_by_their_encoder_and_a_query_belongs_to_none(origin, short, samples, turned_tokens):
    turned = replace(short, init=str(origin), encoders=("vivit", "dinov2"))
    plan, before = make_plan(turned, samples, turned_tokens), weights_of(origin)
    for new, old in ((0, 1), (1, 0)):
        loaded = plan.built.model.projectors[new].head.weight
        assert torch.equal(loaded, before[f"projectors.{old}.head.weight"])
    assert plan.record.started_from.endswith("loaded projector vivit, projector dinov2, fusion, LLM")
    assert torch.equal(plan.built.model.fusion.query_M, before["fusion.query_M"])


@pytest.mark.parametrize("fusion", ["concat_channel", "concat_channel_ln", "learnable_weights"])
def test_a_fusion_with_weights_by_place_is_not_loaded_into_another_order(
    tmp_path, short, samples, tokens, turned_tokens, fusion
):
    config = replace(short, fusion=FusionConfig(name=fusion))
    run_to_end(config, samples, tokens, tmp_path / "first")
    turned = replace(config, init=str(tmp_path / "first"), encoders=("vivit", "dinov2"))
    with pytest.raises(UserError, match="fusion: there it mixes dinov2, vivit, here vivit, dinov2"):
        make_plan(turned, samples, turned_tokens)
    message = make_plan(replace(turned, init_partial=True), samples, turned_tokens).record.started_from
    assert message.endswith("; not fusion: there it mixes dinov2, vivit, here vivit, dinov2")


def test_a_run_is_not_read_in_another_order_than_its_own(origin, short, samples, tokens):
    record = json.loads((origin / "run.json").read_text())
    assert record["encoder_order"] == ["dinov2", "vivit"]
    (origin / "run.json").write_text(json.dumps({**record, "encoder_order": ["vivit", "dinov2"]}))
    state_file = checkpoint.newest(origin) / checkpoint.STATE_FILE
    state = json.loads(state_file.read_text())
    entries = ("step", "data_digest", "identities", "sha256", "validation")  # of version 0.1, which no digest covers
    state_file.write_text(json.dumps({name: state[name] for name in entries}))
    run = load_run(origin)  # names decide: the projectors follow their encoders
    assert run.built.model.encoders == ("vivit", "dinov2")
    held = load_file(checkpoint.newest(origin) / checkpoint.MODEL_FILE)
    for place, encoder in enumerate(("vivit", "dinov2")):
        assert torch.equal(run.built.model.projectors[place].head.weight, held[f"projector.{encoder}.head.weight"])


def test_a_resumed_run_whose_source_has_another_order_is_refused(tmp_path, short, samples, tokens, turned_tokens):
    run_to_end(short, samples, tokens, tmp_path / "run", stop_at=1)
    with pytest.raises(UserError, match=r"with the encoders dinov2, vivit, in this order, .* has vivit, dinov2"):
        run_to_end(short, samples, turned_tokens, tmp_path / "run", resume=True)


def test_a_projector_is_left_out_by_naming_the_encoders_that_stay(tmp_path, origin, short, samples, tokens):
    alone = replace(short, init=str(origin), encoders=("dinov2",))
    message = make_plan(alone, samples, tokens).record.started_from
    assert message.endswith(
        "loaded projector dinov2, fusion, LLM; not projector vivit: the new run does not read that encoder"
    )
    joined = replace(short, fusion=FusionConfig(name="concat_channel"))
    run_to_end(joined, samples, tokens, tmp_path / "joined")
    with pytest.raises(UserError, match="fusion: there it mixes dinov2, vivit, here dinov2"):
        make_plan(replace(joined, init=str(tmp_path / "joined"), encoders=("dinov2",)), samples, tokens)


def test_a_part_that_would_be_dropped_is_an_error_unless_that_is_allowed(origin, short, samples, tokens):
    mean = replace(short, init=str(origin), fusion=FusionConfig(name="equal_mix"))
    with pytest.raises(UserError, match=r"fusion: there it is cross_attention, here equal_mix\. .*--init-partial"):
        make_plan(mean, samples, tokens)
    message = make_plan(replace(mean, init_partial=True), samples, tokens).record.started_from
    assert message.endswith("vivit, LLM; not fusion: there it is cross_attention, here equal_mix")
    words = replace(short, init=str(origin), mode="text-only")
    with pytest.raises(UserError, match="fusion: the new run is text-only"):
        make_plan(words, samples, tokens)


def test_what_does_not_fit_is_named_with_the_reason(origin, short, samples, tokens, monkeypatch):
    monkeypatch.setitem(FRESH_LLMS, "other", FreshLLM(hidden_size=32, num_layers=1, num_heads=2, context=128))
    other = replace(short, init=str(origin), llm="fresh:other", fusion=FusionConfig(name="learnable_weights"))
    with pytest.raises(UserError, match=r"not all of .*origin can be loaded: fusion: .*; LLM: there it is fresh:mini"):
        make_plan(other, samples, tokens)
    other = replace(other, init_partial=True)
    message = make_plan(other, samples, tokens).record.started_from
    assert "loaded projector dinov2, projector vivit; " in message
    assert "not fusion: there it is cross_attention" in message
    assert "not LLM: there it is fresh:mini, here fresh:other" in message


def test_tokens_of_another_identity_are_not_what_a_projector_was_trained_on(origin, short, samples, tokens):
    ids = [sample.clip_id for sample in samples]
    source = MemoryTokens(ids, tokens.fetch(ids))
    source.shapes["dinov2"] = replace(source.shapes["dinov2"], identity="another")
    config = replace(short, init=str(origin), init_partial=True)
    message = make_plan(config, samples, source).record.started_from
    assert "not projector dinov2: it was trained on tokens of identity memory:dinov2" in message
    assert "loaded projector vivit, fusion, LLM" in message


def test_a_start_of_which_nothing_fits_is_an_error(origin, short, samples, tokens, monkeypatch):
    monkeypatch.setitem(FRESH_LLMS, "wide", FreshLLM(hidden_size=48, num_layers=1, num_heads=2, context=128))
    with pytest.raises(UserError, match=r"nothing of .*origin fits: projector dinov2: its shapes are others there"):
        make_plan(replace(short, init=str(origin), llm="fresh:wide"), samples, tokens)


def test_a_start_without_checkpoint_or_with_a_flipped_bit_is_an_error(origin, short, samples, tokens):
    config = replace(short, init=str(origin))
    path = checkpoint.newest(origin) / checkpoint.MODEL_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="differs from its digest"):
        make_plan(config, samples, tokens)
    shutil.rmtree(origin)
    with pytest.raises(UserError, match=r"init: .*origin has no checkpoint yet; train it first"):
        make_plan(config, samples, tokens)


@pytest.mark.parametrize("train_llm", ["none", "full"])
def test_an_llm_that_another_run_has_trained_is_used_and_kept(tmp_path, pretrained, short, samples, tokens, train_llm):
    first = replace(short, llm=pretrained)
    run_to_end(first, samples, tokens, tmp_path / "first")
    trained = weights_of(tmp_path / "first")
    second = replace(first, train_llm=train_llm, init=str(tmp_path / "first"), max_steps=1)
    started = make_plan(second, samples, tokens).built.model.state_dict()
    assert all(torch.equal(value, started[name]) for name, value in trained.items())

    run_to_end(second, samples, tokens, tmp_path / "second")
    shutil.rmtree(pretrained)  # the second run holds its LLM, trained there or not
    shutil.rmtree(tmp_path / "first")
    found = weights_of(tmp_path / "second")
    changed = {name for name in trained if name.startswith("llm.") and not torch.equal(found[name], trained[name])}
    assert bool(changed) == (train_llm == "full")


def test_an_llm_that_was_not_trained_is_taken_from_where_it_came_from(tmp_path, pretrained, short, samples, tokens):
    frozen = replace(short, llm=pretrained, train_llm="none")
    run_to_end(frozen, samples, tokens, tmp_path / "first")
    plan = make_plan(replace(frozen, init=str(tmp_path / "first")), samples, tokens)
    assert plan.record.started_from.endswith("loaded projector dinov2, projector vivit, fusion")
    assert not plan.built.saves_llm


def test_adapters_come_on_top_of_the_llm_that_a_run_has_trained(tmp_path, pretrained, short, samples, tokens):
    first = replace(short, llm=pretrained)
    run_to_end(first, samples, tokens, tmp_path / "first")
    second = replace(first, train_llm="lora", lora=LoraConfig(rank=2), init=str(tmp_path / "first"))
    run_to_end(second, samples, tokens, tmp_path / "second")
    trained, adapted = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    layer = "llm.model.layers.0.self_attn.q_proj"
    assert torch.equal(adapted[f"{layer}.base_layer.weight"], trained[f"{layer}.weight"])
    assert any(".lora_" in name for name in adapted)

    third = replace(second, init=str(tmp_path / "second"))
    plan = make_plan(third, samples, tokens)
    assert "loaded projector dinov2, projector vivit, fusion, LLM, LoRA adapters" in plan.record.started_from
    assert all(torch.equal(value, adapted[name]) for name, value in plan.built.model.state_dict().items())


def test_the_record_of_a_run_from_fresh_weights_names_no_start(origin):
    assert RunRecord.read(origin).started_from == ""


@pytest.mark.parametrize(
    ("train_llm", "is_fresh", "parts"),
    [
        ("full", True, "projector dinov2, projector vivit, fusion, LLM"),
        ("full", False, "projector dinov2, projector vivit, fusion, LLM"),
        ("none", False, "projector dinov2, projector vivit, fusion"),
        ("lora", False, "projector dinov2, projector vivit, fusion, LoRA adapters"),
    ],
)
def test_an_export_is_as_good_a_start_as_the_run_it_was_made_from(
    tmp_path, pretrained, short, samples, tokens, train_llm, is_fresh, parts
):
    run, out = tmp_path / "run", tmp_path / "given"
    first = replace(short, train_llm=train_llm, llm=short.llm if is_fresh else pretrained, lora=LoraConfig(rank=2))
    run_to_end(first, samples, tokens, run)
    export_run(run, out)
    by_run, by_export = (make_plan(replace(first, init=str(start)), samples, tokens) for start in (run, out))
    assert by_export.record.started_from == f"weights of {out} (step 2 of 2): loaded {parts}"
    wanted = by_run.built.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in by_export.built.model.state_dict().items())
    assert by_export.loaded.names == by_run.loaded.names
    assert by_export.built.saves_llm == by_run.built.saves_llm


def test_an_export_with_its_llm_needs_neither_run_nor_base(tmp_path, pretrained, short, samples, tokens):
    lora = replace(short, llm=pretrained, train_llm="lora", lora=LoraConfig(rank=2))
    run_to_end(lora, samples, tokens, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "given", merge_lora=True)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(pretrained)
    config = replace(lora, init=str(tmp_path / "given"), train_llm="none")
    plan = make_plan(config, samples, tokens)
    merged = weights_of(tmp_path / "given")
    assert plan.record.started_from.endswith("loaded projector dinov2, projector vivit, fusion, LLM")
    assert all(torch.equal(value, merged[name]) for name, value in plan.built.model.state_dict().items())
    run_to_end(config, samples, tokens, tmp_path / "next")  # which keeps the LLM, for it is nowhere else
    shutil.rmtree(tmp_path / "given")
    assert torch.equal(weights_of(tmp_path / "next")["llm.lm_head.weight"], merged["llm.lm_head.weight"])


def test_an_export_with_a_flipped_bit_is_no_start(tmp_path, origin, short, samples, tokens):
    export_run(origin, tmp_path / "given")
    path = tmp_path / "given/fusion.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(StoreDamagedError, match=r"given differ from their digests: fusion\.safetensors"):
        make_plan(replace(short, init=str(tmp_path / "given")), samples, tokens)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_weights_of_another_model_than_that_of_the_settings_are_refused(tmp_path, origin, kind):
    folder = origin
    if kind == "export":
        folder = tmp_path / "given"
        export_run(origin, folder)
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace("standardise: true", "standardise: false"))
    with pytest.raises(UserError, match=r"holds another model than its config builds; .*standardise\.mean_D"):
        load_run(folder)
