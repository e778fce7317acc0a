"""Checkpoints in the layout of princetonvisualai/merv at toy size, of plain torch modules that compute as it does."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from mervcache.errors import UserError
from trainer.cli_eval import eval_main
from trainer.config import FusionConfig
from trainer.data.collate import make_batch
from trainer.data.tokens import MemoryTokens
from trainer.evaluate import EvaluationRequest, evaluate_run
from trainer.loop.plan import make_plan
from trainer.loop.train import train
from trainer.model.llm import load_llm
from trainer.official import MAX_LISTED, check_names, import_official
from trainer.runs.load import load_run
from trainer.sources import check_identities, open_store, opened

WIDTH, TIME, SIDE = 32, 4, 2  # of fresh:mini; of the visual tokens
ENCODERS = {"languagebind-video-noclass": 6, "dinov2-video-all-tokens": 8}  # id -> width
NAMES = ("languagebind", "dinov2")


class Linear(nn.Module):
    """`LinearProjector`: a linear layer called projector."""

    def __init__(self, width, out):
        super().__init__()
        self.projector = nn.Linear(width, out)

    def forward(self, x):
        return self.projector(x)


class Mlp(Linear):
    def __init__(self, width, out):
        super().__init__(width, out)
        self.projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class Average(nn.Module):
    """`AveragePooling3DProjector`: features [B, F, H W, C] -> [B, F' H' W', M]."""

    def __init__(self, head, time):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d((time, SIDE, SIDE))
        self.projector = head

    def forward(self, x):
        batch, frames, patches, width = x.shape
        side = int(patches**0.5)
        pooled = self.pool(x.reshape(batch, frames, side, side, width).permute(0, 4, 1, 2, 3))
        return self.projector(pooled.flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """`CrossAttentionAdapterLearnableQuery`: a real MultiheadAttention of which only the weights are used."""

    def __init__(self, query_width):
        super().__init__()
        self.attention = nn.MultiheadAttention(query_width, 1, batch_first=True, kdim=WIDTH, vdim=WIDTH)
        self.Q = nn.Parameter(torch.empty(1, query_width))
        for parameter in self.parameters():
            nn.init.normal_(parameter)  # biases too, so that none could be dropped unseen

    def forward(self, embeddings):
        stacked = torch.stack(embeddings, 1)  # B E N M
        means = stacked.mean(2)
        _, weights = self.attention(self.Q.repeat(len(stacked), 1)[:, None], means, means)
        return torch.bmm(weights, stacked.flatten(2)).view(stacked[:, 0].shape), weights[:, 0]


class ConcatChannel(nn.Module):
    def __init__(self, count, has_norm):
        super().__init__()
        layers = [nn.LayerNorm(count * WIDTH), Linear(count * WIDTH, WIDTH)]
        self.layers = nn.Sequential(*layers) if has_norm else layers[1]
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def state_dict(self, **options):
        return self.layers.state_dict(**options)

    def forward(self, embeddings):
        return self.layers(torch.cat(embeddings, -1)), None


class Plain(nn.Module):
    """Fusions that are a formula."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        if name == "scalar":
            self.scalar = nn.Parameter(torch.randn(len(ENCODERS)))

    def forward(self, embeddings):
        if self.name == "scalar":
            weights = self.scalar.softmax(0)
            return sum(weight * x for weight, x in zip(weights, embeddings, strict=True)), weights
        return (torch.cat(embeddings, 1) if self.name == "concat" else embeddings[0]), None


class Reference(nn.Module):
    """The model whose state dict is saved; `forward` as models/vidlms/merv.py, for one visual input per text."""

    def __init__(self, llm, *, fusion="cross_attention_avg_lq", head=Linear, query_width=24, time=TIME):
        super().__init__()
        self.projectors = nn.ModuleList([Average(head(width, WIDTH), time) for width in ENCODERS.values()])
        kinds = {
            "cross_attention_avg_lq": lambda: Attention(query_width),
            "concat_channel": lambda: ConcatChannel(len(ENCODERS), has_norm=False),
            "concat_channel_ln": lambda: ConcatChannel(len(ENCODERS), has_norm=True),
        }
        self.feature_fusion = kinds.get(fusion, lambda: Plain(fusion))()
        self.llm_backbone = nn.Module()
        self.llm_backbone.llm = llm

    def fused(self, features):
        return self.feature_fusion([project(x) for project, x in zip(self.projectors, features, strict=True)])

    def logits(self, features, input_ids):
        text = self.llm_backbone.llm.get_input_embeddings()(input_ids)
        visual = self.fused(features)[0]
        return self.llm_backbone.llm(inputs_embeds=torch.cat([text[:, :1], visual, text[:, 1:]], 1)).logits

    def parts(self):
        parts = {name: dict(getattr(self, name).state_dict()) for name in ("projectors", "llm_backbone")}
        return {**parts, "feature_fusion": dict(self.feature_fusion.state_dict())}


@pytest.fixture
def settings():
    """config.json of the toy, with a training setting and one that we do not read."""
    model = {
        "model_id": "merv-base",
        "arch_specifier": "no-align+3davg+linear",
        "feature_fusion": "cross_attention_avg_lq",
        "video_backbone_ids": list(ENCODERS),
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 100,
        "num_frames": [TIME, TIME],
        "projector_token_length": SIDE**2,
        "visual_feature_length": TIME * SIDE**2,
        "finetune_learning_rate": 3e-5,
    }
    return {"model": model, "seed": 7}


@pytest.fixture
def identities(identities):
    """Tokens of the frames that a model of encoders with 4 and with 8 frames is trained on."""
    rules = {"dinov2": "linspace-8/2", "vivit": "linspace-8"}
    return {name: replace(identity, frame_rule=rules[name]) for name, identity in identities.items()}


@pytest.fixture
def base(tmp_path, samples):
    """The LLM that the toy was trained from, without a pad token, as LLaMA-2; 18 words."""
    torch.manual_seed(0)
    llm = load_llm("fresh:mini", texts=["In: What colour is it?\nOut:", "red green blue"])
    llm.tokenizer.pad_token = None
    llm.tokenizer.save_pretrained(tmp_path / "base")
    llm.model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make(tmp_path, settings, base):
    """A checkpoint and its config on disk, and the reference model they are of."""

    def build(*, change_parts=lambda parts: parts, arch=None, **options):
        llm = load_llm(str(base)).model
        llm.resize_token_embeddings(llm.config.vocab_size + 1, pad_to_multiple_of=64)
        torch.manual_seed(1)
        reference = Reference(llm, **options).eval()
        settings["model"]["feature_fusion"] = options.get("fusion", settings["model"]["feature_fusion"])
        settings["model"]["arch_specifier"] = arch or settings["model"]["arch_specifier"]
        (tmp_path / "config.json").write_text(json.dumps(settings, indent=1))
        saved = {"model": change_parts(reference.parts()), "lr_scheduler": {"_step_count": 9}, "step": 5979}
        torch.save(saved, tmp_path / "latest-checkpoint.pt")
        return reference

    return build


@pytest.fixture
def take(tmp_path, base):
    """Import what `make` wrote."""

    def run(**options):
        import_official(
            tmp_path / "latest-checkpoint.pt", tmp_path / "config.json", llm=str(base), out=tmp_path / "run", **options
        )
        return load_run(tmp_path / "run")

    return run


@pytest.fixture
def features():
    """Raw grids [2, F, 4 x 4, D] in the order of the encoders."""
    random = torch.Generator().manual_seed(5)
    return [torch.randn(2, TIME, 16, width, generator=random) * 3 + 1 for width in ENCODERS.values()]


def stored(features):
    """The same as a store would hold them: pooled to TIME x SIDE x SIDE."""
    grids = [x.reshape(2, TIME, 2, 2, 2, 2, x.shape[-1]).mean((3, 5)) for x in features]
    return dict(zip(NAMES, grids, strict=True))


@torch.no_grad()
def assert_equal_to_the_reference(run, reference, features):
    tokens = stored(features)
    fused, weights = run.built.model.visual_tokens(tokens)
    wanted, wanted_weights = reference.fused(features)
    torch.testing.assert_close(fused, wanted, rtol=1e-5, atol=1e-5)
    if wanted_weights is not None:
        torch.testing.assert_close(weights, wanted_weights.expand_as(weights), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fused_tokens_and_logits_are_those_of_the_reference(make, take, features, make_sample):
    reference, run = make(), take()
    assert_equal_to_the_reference(run, reference, features)
    model = run.built.model
    rendered = run.built.renderer(make_sample(0).turns)
    source = MemoryTokens(["a", "b"], stored(features))
    batch = make_batch([rendered, rendered], ["a", "b"], source, model.num_visual_tokens, model.context)
    found = model.llm(inputs_embeds=model.splice(batch)).logits
    wanted = reference.logits(features, torch.tensor([rendered.input_ids] * 2))
    assert found.shape == wanted.shape == (2, 16 + len(rendered.input_ids), 64)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 0.01  # the clips do matter


def test_projections_of_equal_width_lie_in_one_tensor(make, take, features):
    reference = make(query_width=WIDTH)
    assert "attention.in_proj_weight" in reference.feature_fusion.state_dict()
    run = take()
    assert_equal_to_the_reference(run, reference, features)
    assert run.built.config.fusion == FusionConfig(name="cross_attention_released", query_width=WIDTH)


@pytest.mark.parametrize("fusion", ["concat", "concat_channel", "concat_channel_ln", "scalar", "first"])
def test_every_fusion_of_the_reference_is_imported(make, take, features, fusion):
    reference = make(fusion=fusion)
    run = take()
    assert_equal_to_the_reference(run, reference, features)
    assert run.built.config.encoders == (NAMES[:1] if fusion == "first" else NAMES)


def test_an_mlp_head_and_divided_frames_are_imported(make, take, features):
    reference = make(head=Mlp, time=TIME // 2, arch="no-align+3davg+frame2+gelu-mlp")
    run = take()
    assert run.built.config.projector.grid == (TIME // 2, SIDE, SIDE)
    assert run.record.shapes["dinov2"].grid == (TIME, SIDE, SIDE)
    assert_equal_to_the_reference(run, reference, features)


def test_what_cannot_change_an_output_changes_none(make, take, features, tmp_path):
    def scramble(parts):
        fusion = parts["feature_fusion"]
        for name in ("attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"):
            fusion[name] = torch.randn_like(fusion[name]) * 100
        fusion["attention.in_proj_bias"][24:] = 100 * torch.randn(48)  # of keys and values
        return parts

    reference = make()
    make(change_parts=scramble)
    run = take()
    assert_equal_to_the_reference(run, reference, features)
    origin = json.loads((tmp_path / "run/imported.json").read_text())
    assert origin["left_out"] == [
        f"feature_fusion.attention.{name}" for name in ("out_proj.bias", "out_proj.weight", "v_proj_weight")
    ]


def test_older_releases_call_the_parts_otherwise(make, take, settings, features, monkeypatch):
    monkeypatch.setitem(ENCODERS, "languagebind-video-noclass", 6)
    monkeypatch.delitem(ENCODERS, "dinov2-video-all-tokens")
    settings["model"] |= {"video_backbone_ids": list(ENCODERS), "num_frames": TIME}

    def rename(parts):
        projectors = parts.pop("projectors")
        parts["projector"] = {name.removeprefix("0."): tensor for name, tensor in projectors.items()}
        parts["adapter"] = parts.pop("feature_fusion")
        return {**parts, "video_backbone": {}}

    reference = make(change_parts=rename)
    run = take()
    with torch.no_grad():
        fused, _ = run.built.model.visual_tokens({"languagebind": stored(features)["languagebind"]})
        torch.testing.assert_close(fused, reference.fused(features[:1])[0], rtol=1e-5, atol=1e-5)


def test_the_run_records_what_it_is(make, take, tmp_path):
    make()
    run = take()
    config = run.built.config
    assert (config.train_llm, config.prompt, config.max_text_tokens) == ("full", "pure", 100)
    assert (config.encoders, config.projector.grid) == (NAMES, (TIME, SIDE, SIDE))
    assert (config.optimizer.llm_lr, config.optimizer.weight_decay) == (3e-5, 0.1)
    assert run.step == run.record.num_steps == 5979
    assert run.record.num_visual_tokens == 16
    assert run.record.shapes["languagebind"].identity == "unbound:languagebind-video-noclass"
    origin = json.loads((tmp_path / "run/imported.json").read_text())
    assert (origin["source"], origin["file"]) == ("princetonvisualai/merv", "latest-checkpoint.pt")
    assert origin["config"]["model_id"] == "merv-base"
    assert run.built.llm.tokenizer.pad_token == "<PAD>"
    assert run.built.llm.model.get_input_embeddings().weight.shape[0] == 64


def test_the_config_may_be_yaml_without_the_training_around_it(make, tmp_path, settings, base):
    make()
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(settings["model"]))
    report = import_official(
        tmp_path / "latest-checkpoint.pt", tmp_path / "official.yaml", llm=str(base), out=tmp_path / "run"
    )
    assert list(report["encoders"]) == list(NAMES)


def test_an_unbound_run_asks_for_tokens_of_its_sizes(make, take, features):
    make()
    run = take()
    check_identities(run, MemoryTokens(["a", "b"], stored(features)))
    wide = {**stored(features), "dinov2": torch.zeros(2, TIME, SIDE, SIDE, 9)}
    with pytest.raises(UserError, match="reads dinov2 tokens of 4x2x2 of width 8, this source has 4x2x2 of width 9"):
        check_identities(run, MemoryTokens(["a", "b"], wide))
    with pytest.raises(UserError, match="this source has none"):
        check_identities(run, MemoryTokens(["a", "b"], {"dinov2": stored(features)["dinov2"]}))


def test_with_a_store_the_run_is_bound_to_its_identities_and_evaluated(
    make, take, settings, question_store, monkeypatch, tmp_path
):
    monkeypatch.setitem(ENCODERS, "vivit-google-b-all-no-cls-16frames", 6)
    monkeypatch.delitem(ENCODERS, "languagebind-video-noclass")
    settings["model"] |= {"video_backbone_ids": list(ENCODERS), "num_frames": [TIME, 2 * TIME]}
    make()
    run = take(store=str(question_store))
    _, source = open_store(str(question_store), run.built.config)
    assert {name: shape.identity for name, shape in run.record.shapes.items()} == {
        name: source.shapes[name].identity for name in ("dinov2", "vivit")
    }
    assert list(run.record.shapes) == ["dinov2", "vivit"]
    assert run.record.encoders["vivit"]["weights"] == "random:0"
    scores = evaluate_run(tmp_path / "run", EvaluationRequest())["scores"]
    assert (scores[0]["questions"], scores[0]["protocol"]) == (3, "letters")


@pytest.fixture
def two(make, settings, monkeypatch):
    """A checkpoint of the encoders of the question store."""

    def build(num_frames=(TIME, 2 * TIME), **options):
        monkeypatch.setitem(ENCODERS, "vivit-google-b-all-no-cls-16frames", 6)
        monkeypatch.delitem(ENCODERS, "languagebind-video-noclass", raising=False)
        settings["model"] |= {"video_backbone_ids": list(ENCODERS), "num_frames": list(num_frames)}
        return make(**options)

    return build


def test_tokens_of_other_frames_are_refused_with_and_without_a_store(
    two, take, question_store, toy_identity, tmp_path, write_store, features
):
    two(num_frames=(TIME, TIME * 2))
    run = take()
    assert run.record.wanted["vivit"] == {"frame_rule": "linspace-8", "preprocessing.fit": "squash"}
    _, source = open_store(str(question_store), run.built.config)
    check_identities(run, source)
    source.facts["dinov2"]["identity"]["frame_rule"] = "linspace-32/2"
    message = "dinov2 tokens of frame_rule linspace-8/2, this source has linspace-32/2: extract"
    with pytest.raises(UserError, match=message):
        check_identities(run, source)
    source.facts["dinov2"]["identity"] |= {"frame_rule": "linspace-8/2", "preprocessing": {"fit": "centre-crop"}}
    with pytest.raises(UserError, match=r"preprocessing\.fit squash, this source has centre-crop"):
        check_identities(run, source)


def test_a_store_of_other_frames_is_refused_at_import(make, take, settings, question_store, monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "dinov2-video-all-tokens", 8)
    monkeypatch.delitem(ENCODERS, "languagebind-video-noclass")
    settings["model"] |= {"video_backbone_ids": list(ENCODERS), "num_frames": [TIME]}
    make()
    with pytest.raises(UserError, match="frame_rule linspace-4, this source has linspace-8/2"):
        take(store=str(question_store))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_bound", [True, False])
def test_a_run_starts_from_all_weights_of_an_import(two, take, question_store, base, tmp_path, is_bound):
    two(fusion="concat_channel")
    imported = take(**({"store": str(question_store)} if is_bound else {}))
    origin = imported.built.model.state_dict()
    config = replace(
        imported.built.config, init=str(tmp_path / "run"), encoders=(), batch_size=6, max_steps=1, precision="fp32"
    )
    with opened(str(question_store)) as open_tokens:
        samples, source = open_tokens(config, tmp_path / "next")
        plan = make_plan(config, samples, source)
        assert plan.record.started_from.endswith("loaded projector dinov2, projector vivit, fusion, LLM")
        started = plan.built.model.state_dict()
        assert all(torch.equal(value.float(), started[name].float()) for name, value in origin.items())
        train(config, samples, source, tmp_path / "next", store=str(question_store), quiet=True)
    assert load_run(tmp_path / "next").step == 1


def test_tokens_that_an_unbound_import_was_not_trained_on_are_no_start(two, take, question_store, tmp_path):
    two()
    config = replace(take().built.config, init=str(tmp_path / "run"), batch_size=6, max_steps=1)
    with opened(str(question_store)) as open_tokens:
        samples, source = open_tokens(config, None)
        source.facts["vivit"]["identity"]["frame_rule"] = "linspace-32/1"
        with pytest.raises(UserError, match=r"projector vivit: .* linspace-8, this source has linspace-32/1"):
            make_plan(config, samples, source)


def test_a_store_with_other_widths_is_refused(make, take, settings, question_store, tmp_path):
    make()
    with pytest.raises(UserError, match="unknown encoder 'languagebind'"):
        take(store=str(question_store))
    assert not (tmp_path / "run").exists()


def test_missing_and_unknown_names_are_listed(make, take, tmp_path):
    def rename(parts):
        projectors = parts["projectors"]
        projectors["0.projector.projecter.weight"] = projectors.pop("0.projector.projector.weight")
        return parts

    make(change_parts=rename)
    with pytest.raises(UserError) as error:
        take()
    assert "missing: 0.projector.projector.weight; unknown: 0.projector.projecter.weight" in str(error.value)
    assert not list(tmp_path.glob("run*"))


def test_a_long_list_of_names_is_cut():
    with pytest.raises(UserError, match=r"missing: a00, .*a19 and 5 more$"):
        check_names("it", set(), {f"a{index:02}" for index in range(MAX_LISTED + 5)})


def test_unknown_and_missing_parts_are_named(make, take):
    make(change_parts=lambda parts: {**parts, "extra": {"a": torch.zeros(1)}})
    with pytest.raises(UserError, match="unknown parts extra; known: projectors, feature_fusion, llm_backbone"):
        take()
    make(change_parts=lambda parts: {name: value for name, value in parts.items() if name != "llm_backbone"})
    with pytest.raises(UserError, match="holds no llm_backbone"):
        take()


def test_sizes_that_differ_are_named(make, take):
    def cut(parts):
        parts["projectors"]["1.projector.projector.bias"] = torch.zeros(5)
        return parts

    make(change_parts=cut)
    with pytest.raises(UserError, match=r"projectors.1.head.bias is \[5\], should be \[32\]"):
        take()


def test_constants_of_the_position_code_that_old_versions_saved_are_left_out(make, take):
    def add(parts):
        parts["llm_backbone"]["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        return parts

    make(change_parts=add)
    assert take().step == 5979


def test_an_llm_with_more_words_than_rows_is_refused(make, take):
    def shorten(parts):
        for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
            parts["llm_backbone"][name] = parts["llm_backbone"][name][:5].clone()
        return parts

    make(change_parts=shorten)
    with pytest.raises(UserError, match=r"knows 5 tokens, the tokenizer of .* has"):
        take()


def test_a_run_is_not_overwritten(make, take):
    make()
    take()
    with pytest.raises(UserError, match="run exists already; choose another --out"):
        take()


def test_the_command_imports_a_run_that_can_be_evaluated_and_given_away(
    make, settings, question_store, monkeypatch, tmp_path, base
):
    monkeypatch.setitem(ENCODERS, "vivit-google-b-all-no-cls-16frames", 6)
    monkeypatch.delitem(ENCODERS, "languagebind-video-noclass")
    settings["model"] |= {"video_backbone_ids": list(ENCODERS), "num_frames": [TIME, 2 * TIME]}
    make()
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(eval_main, [str(argument) for argument in arguments])

    options = ("--config", "config.json", "--llm", base, "--out", "run", "--json")
    report = call("import-official", "latest-checkpoint.pt", *options)
    assert report.exit_code == 0, report.output
    assert json.loads(report.stdout)["step"] == 5979
    assert "names no store of its own" in call("run", "--checkpoint", "run").stderr
    bound = json.loads(report.stdout)["bound_to"]
    assert bound == {
        "prompt": "pure",
        "image_resize_strategy": "resize-naive",
        "frame_rules": {"dinov2": "linspace-8/2", "vivit": "linspace-8"},
        "fusion": "cross_attention_released",
        "store": None,
    }
    shown = call("import-official", "latest-checkpoint.pt", *options[:-2], "shown").stdout
    for word in ("prompt: pure", "dinov2 linspace-8/2, vivit linspace-8", "resize-naive", "cross_attention_released"):
        assert word in shown
    scored = call("run", "--checkpoint", "run", "--store", question_store, "--json")
    assert json.loads(scored.stdout)["scores"][0]["questions"] == 3
    assert call("export", "--checkpoint", "run", "--out", "given").exit_code == 0
    assert "Imported from a checkpoint of princetonvisualai/merv" in (tmp_path / "given/README.md").read_text()
    assert (
        "refused"
        in call("import-official", "config.json", "--config", "config.json", "--llm", base, "--out", "b").stderr
    )
