"""The commands that move stores, from the words typed to the words printed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore import Clip, FeatureStore
from pipeline.cli.extract import main


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def answer(*words) -> dict:
    result = CliRunner().invoke(main, [*(str(word) for word in words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_store_goes_to_a_bucket_and_back_and_every_reading_command_takes_the_url(extracted, s3, tmp_path):
    pushed = answer("push", extracted.store, s3, "--license", "cc-by-4.0", "--no-journal")
    assert pushed["sent_bytes"] == pushed["bytes"] > 0
    pulled = answer("pull", s3, tmp_path / "back.zarr", "--encoders", "siglip,vivit", "--check")
    assert [name.split("-")[0] for name in pulled["encoders"]] == ["siglip", "vivit"]
    assert answer("status", s3)["clips"] == answer("status", extracted.store)["clips"]
    assert answer("verify", s3, "--full")["findings"] == []
    code, printed = run("push", extracted.store, s3)
    assert code == 0
    assert "0 blocks of" in printed


def test_a_store_goes_to_the_hub_and_is_read_back_there_but_nothing_is_extracted_into_it(extracted, hub, tmp_path):
    url = "hf://datasets/lab/feats"
    pushed = answer("push", extracted.store, url, "--encoders", "siglip", "--no-journal", "--check")
    assert pushed["sent_bytes"] == pushed["bytes"] > 0
    assert pushed["card"] is True
    assert answer("status", url)["clips"] == answer("status", extracted.store)["clips"]
    assert not any(path.startswith("journal/") for path in hub.files)
    pulled = answer("pull", url, tmp_path / "back.zarr", "--check")
    assert [name.split("-")[0] for name in pulled["encoders"]] == ["siglip"]
    commits = len(hub.commits)
    for words in (("extract", "--dataset", "demo", "--store", url), ("union", extracted.store, extracted.store, url)):
        code, printed = run(*words)
        assert code == 1
        assert (
            f"write to a folder, s3://, gs:// or az://, then send that with `merv-pipeline push STORE {url}`" in printed
        )
    assert len(hub.commits) == commits


def test_subset_union_export_and_import(extracted, tmp_path):
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    assert answer("subset", extracted.store, a, "--encoders", "siglip", "--kind", "video")["cells"] == 9
    assert answer("subset", extracted.store, b, "--encoders", "siglip", "--kind", "image")["cells"] == 5
    assert answer("union", a, b, tmp_path / "both.zarr")["clips"] == 14
    assert answer("export", tmp_path / "both.zarr", tmp_path / "tars", "--format", "webdataset")["cells"] == 14
    assert answer("import", tmp_path / "tars", tmp_path / "again.zarr")["cells"] == 14
    ids = FeatureStore.open(a).clips["clip_id"].to_pylist()
    digests = {FeatureStore.open(s).data_digest(ids, ["siglip"]) for s in (extracted.store, a, tmp_path / "again.zarr")}
    assert len(digests) == 1


def test_one_dataset_is_pulled_in_the_blocks_that_hold_it_or_cut_out(write_store, toy_identity, tmp_path, s3):
    """Two datasets of two blocks each."""
    store, identity = tmp_path / "both.zarr", toy_identity()
    clips = [Clip(dataset=name, path=f"{n}.mp4", kind="video") for name in ("msvd", "other") for n in range(4)]
    tokens = np.ones((*identity.grid, identity.width), np.float16)
    cells = {("toy", clip.clip_id): {"tokens": tokens} for clip in clips}
    writer = write_store(store, clips, {"toy": identity}, cells, block_rows=2)
    writer.publish_snapshot()
    answer("push", store, s3)
    pulled = answer("pull", s3, tmp_path / "msvd.zarr", "--dataset", "msvd")
    assert (pulled["blocks"], pulled["overhead"]) == (2, 1.0)
    assert pulled["sent_bytes"] == pulled["bytes"] == answer("status", store)["bytes"] // 2
    assert answer("status", tmp_path / "msvd.zarr")["encoders"][0]["committed"] == 4
    cut = answer("subset", s3, tmp_path / "cut.zarr", "--dataset", "msvd")
    assert (cut["clips"], cut["cells"]) == (4, 4)
    assert answer("status", tmp_path / "cut.zarr")["datasets"] == {"msvd": 4}
    code, printed = run("pull", s3, tmp_path / "none.zarr", "--dataset", "msvdd")
    assert code == 1
    assert "unknown dataset 'msvdd', the nearest known one is 'msvd'" in printed


def test_a_tag_is_made_listed_and_read(write_store, toy_identity, tmp_path):
    store, identity = tmp_path / "toy.zarr", toy_identity()
    for number in range(2):
        clip = Clip(dataset="toy", path=f"{number}.mp4", kind="video")
        tokens = np.ones((*identity.grid, identity.width), np.float16)
        write_store(store, [clip], {"toy": identity}, {("toy", clip.clip_id): {"tokens": tokens}}).publish_snapshot()
        if number == 0:
            made = answer("tag", store, "paper-v1")
    assert answer("status", store)["tags"] == {"paper-v1": made["snapshot"]}
    assert f"tag paper-v1: snapshot {made['snapshot']}" in run("status", store)[1]
    assert len(FeatureStore.open(store, snapshot="paper-v1")) == 1
    for words, message in (
        (("tag", store, "paper-v1"), "move it with --force"),
        (("tag", store, "a/b"), "a tag is letters, digits"),
        (("tag", store, "one", "two"), "give a store and one tag"),
        (("tag", tmp_path / "no.zarr", "v1"), "there is no feature store at"),
    ):
        code, printed = run(*words)
        assert code != 0
        assert message in printed.replace("\n", " ")
    assert answer("tag", store, "paper-v1", "--force")["snapshot"] == FeatureStore.open(store).snapshot


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("union", "one.zarr", "out.zarr"), "two stores or more"),
        (("push", "nowhere.zarr", "out.zarr"), "there is no feature store at nowhere.zarr"),
        (("pull", "ftp://host/a", "out.zarr"), "unknown kind of URL 'ftp'"),
        (("subset", "nowhere.zarr", "out.zarr"), "there is no feature store"),
        (("subset", "nowhere.zarr", "out.zarr", "--split", "train"), "there is no feature store"),
    ],
)
def test_mistakes_are_told_without_a_traceback(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = run(*words)
    assert code in (1, 2)
    assert message in printed


def test_the_help_says_what_was_not_tried():
    printed = " ".join(run("push", "--help")[1].split())
    assert "with the real hf_xet and its local content store, not against the Hub itself" in printed
    assert "none was tried against the service itself" in printed
