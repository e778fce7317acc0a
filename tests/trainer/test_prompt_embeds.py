"""Prompts as embeddings: the LLM alone answers them as the run does, and the tensors are what vLLM reads."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from featurestore import FeatureStore
from mervcache.errors import UserError
from trainer.cli_eval import eval_main
from trainer.loop.train import train
from trainer.model.open_ended import answer_batch
from trainer.prompt_embeds import export_prompt_embeds
from trainer.runs.load import load_run
from trainer.sources import open_store_for


def exported(out) -> tuple[dict, list[dict], dict[str, torch.Tensor]]:
    """Record, lines, and tensors by name."""
    record = json.loads((out / "prompt_embeds.json").read_text())
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    tensors = {name: tensor for file in record["files"] for name, tensor in load_file(out / file).items()}
    return record, lines, tensors


def test_a_prompt_is_the_text_around_the_fused_tokens_of_its_clip(benchmark_run, question_store, tmp_path):
    done = export_prompt_embeds(benchmark_run, tmp_path / "out")
    record, lines, tensors = exported(tmp_path / "out")
    run, store = load_run(benchmark_run), FeatureStore.open(question_store)
    model, built = run.built.model, run.built
    assert (done["prompts"], len(lines), len(tensors)) == (8, 8, 8)
    assert (record["snapshot"], record["step"]) == (store.snapshot, run.step)
    for line in lines:
        embeds_SM, start, count = tensors[line["name"]], line["visual_at"], line["visual_tokens"]
        assert embeds_SM.shape == (line["tokens"], record["width"])
        read = {name: store.read([line["clip_id"]], encoder=name) for name in model.encoders}
        tokens = {name: torch.from_numpy(tokens_CTHWD).float() for name, tokens_CTHWD in read.items()}
        with torch.no_grad():
            fused_CNM, _ = model.visual_tokens(tokens)
        assert torch.equal(embeds_SM[start : start + count], fused_CNM[0])
        sample = next(s for name in store.sample_names for s in store.samples(name) if s.clip_id == line["clip_id"])
        ids = torch.tensor(built.renderer.question(sample.turns).input_ids)
        text_LM = torch.cat([embeds_SM[:start], embeds_SM[start + count :]])
        assert torch.equal(text_LM, built.llm.model.get_input_embeddings().weight[ids])


def test_the_llm_alone_answers_as_the_run_does(benchmark_run, question_store, tmp_path):
    export_prompt_embeds(benchmark_run, tmp_path / "out")
    _, lines, tensors = exported(tmp_path / "out")
    run = load_run(benchmark_run)
    samples, source = open_store_for(run, str(question_store))
    asked = [sample for sample in samples if sample.source == "MSVD"]
    answers = answer_batch(run.built, asked, source, "cpu", max_new_tokens=8)
    theirs = {answer.sample_id: answer.text for answer in answers}
    tokenizer, llm = run.built.llm.tokenizer, run.built.llm.model.eval()
    found = {}
    for line in [line for line in lines if not line["options"]]:
        ids = llm.generate(
            inputs_embeds=tensors[line["name"]][None],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=list(run.built.renderer.end_ids),
            pad_token_id=tokenizer.eos_token_id,
        )
        found[line["sample_id"]] = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert found == theirs
    assert len(found) == 3


def test_a_tensor_is_what_the_completions_api_of_vllm_accepts(benchmark_run, tmp_path):
    """vLLM: base64 of what torch.load(weights_only=True) reads, [tokens, width of the LLM], floating point."""
    export_prompt_embeds(benchmark_run, tmp_path / "out", limit=1)
    record, _, tensors = exported(tmp_path / "out")
    buffer = io.BytesIO()
    torch.save(tensors["prompt-000000"], buffer)
    body = json.dumps({"prompt_embeds": base64.b64encode(buffer.getvalue()).decode()})
    received = base64.b64decode(json.loads(body)["prompt_embeds"], validate=True)
    tensor = torch.load(io.BytesIO(received), weights_only=True, map_location="cpu")
    assert tensor.dim() == 2
    assert tensor.is_floating_point()
    assert tensor.shape[1] == record["width"] == load_run(benchmark_run).built.llm.model.config.hidden_size
    assert torch.equal(tensor, tensors["prompt-000000"])


def test_many_prompts_are_in_several_files(benchmark_run, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.prompt_embeds.MAX_FILE_BYTES", 1)
    export_prompt_embeds(benchmark_run, tmp_path / "out", limit=3)
    record, lines, tensors = exported(tmp_path / "out")
    assert record["files"] == [line["file"] for line in lines]
    assert len(set(record["files"])) == len(tensors) == 3


def test_the_command_counts_what_has_no_tokens_and_refuses_what_does_not_fit(
    benchmark_run, make_question_store, tmp_path
):
    def run(*words):
        result = CliRunner().invoke(eval_main, ["export", "--checkpoint", str(benchmark_run), *map(str, words)])
        return result.exit_code, result.output

    other = make_question_store(tmp_path / "other.zarr", failed=[("dinov2", "set/clip20.mp4")])
    words = ("--format", "prompt-embeds", "--store", other)
    code, printed = run("--out", tmp_path / "out", *words)
    assert code == 3
    assert "2 prompts of step 1" in printed
    assert "1 questions without tokens" in printed
    for given, message in (
        (("--out", tmp_path / "out", *words), "exists already"),
        (("--out", tmp_path / "two", *words, "--with-llm"), "--with-llm: for --format model"),
        (("--out", tmp_path / "two", "--limit", "2"), "--limit: for --format prompt-embeds"),
        (("--out", tmp_path / "two", *words, "--split", "none"), "no multiple-choice question of split 'none'"),
    ):
        code, printed = run(*given)
        assert code == 1
        assert message in printed
    assert not (tmp_path / "two").exists()


def test_a_text_only_run_has_nothing_to_export(tmp_path, config, samples, tokens):
    train(replace(config, max_steps=1, mode="text-only"), samples, tokens, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="is a text-only run: it has no visual tokens"):
        export_prompt_embeds(tmp_path / "run", tmp_path / "out")
