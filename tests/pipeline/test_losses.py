"""Records and files that a dataset leaves out: counted, shown, and in the exit code; links that are allowed."""

import json
import os
import shutil

import pytest
import yaml
from click.testing import CliRunner

from featurestore import FeatureStore
from mervcache.errors import EXIT_WITH_FAILURES, UserError
from pipeline.cli.extract import main
from pipeline.datasets import load_dataset
from pipeline.decode.sampling import DecodeJob
from pipeline.explorer import Explorer
from pipeline.media import MediaRoot
from pipeline.recompute import verify_media
from pipeline.summary import media_root, media_roots
from pipeline.views import ResizeRule, View


def run(lab, *arguments: str, **changes):
    path = lab.folder / "config.yaml"
    path.write_text(yaml.safe_dump(lab.settings(encoders=["siglip"], **changes)))
    return CliRunner().invoke(main, [*arguments, "--config", str(path)])


def test_a_refused_record_is_shown_recorded_and_in_the_exit_code_of_every_run(lab):
    root = lab.copy_of_root()
    path = root / "valley_llavaimage.json"
    record = {"id": "x", "film": "valley/v5.mp4", "conversations": json.loads(path.read_text())[0]["conversations"]}
    path.write_text(json.dumps([*json.loads(path.read_text()), record]))
    reason = "medium under 'film' is not read: rename the key to 'video' or 'image'"
    for _ in ("computes", "has nothing to do"):
        done = run(lab, "extract", limit=2)
        assert done.exit_code == EXIT_WITH_FAILURES, done.output
        assert "'film'" in done.stdout
        assert "valley_llavaimage.json record 3 (id 'x')" in done.stderr
    as_json = json.loads(run(lab, "extract", "--json", limit=2).stdout)
    assert as_json["rejected"] == {reason: 1}
    assert FeatureStore.open(lab.store).runs()[-1]["summary"]["rejected"] == {reason: 1}


def test_absent_media_are_named_and_in_the_exit_code(lab):
    root = lab.copy_of_root()
    (root / "valley/v8.mp4").unlink()
    done = run(lab, "extract", limit=2)
    assert done.exit_code == EXIT_WITH_FAILURES, done.output
    assert "absent: media of 1 clip in valley" in done.stderr
    assert "absent: valley/v8.mp4" in done.stdout
    assert "missing_files" not in FeatureStore.open(lab.store).runs()[-1]["summary"]  # a million names of a part


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_of_many_absent_media_ten_are_named_and_json_has_all(lab, command):
    path = lab.copy_of_root() / "valley_llavaimage.json"
    records = json.loads(path.read_text())
    gone = [f"valley/gone{number:02}.mp4" for number in range(12)]
    path.write_text(json.dumps([*records, *(records[0] | {"id": name, "video": name} for name in gone)]))
    probe = {"plan": ["--probe", "0"]}.get(command, [])
    shown = run(lab, command, *probe, limit=2).stdout
    assert [name for name in gone if f"absent: {name}" in shown] == gone[:10]
    assert "and 2 more" in shown
    assert json.loads(run(lab, command, *probe, "--json", limit=2).stdout)["missing_files"] == gone


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_a_dataset_without_a_clip_is_an_error_with_its_causes(lab, command):
    root = lab.folder / "hub/snapshots/r"
    (root / "v").mkdir(parents=True)
    (lab.folder / "hub/blobs").mkdir()
    shutil.copy(lab.root / "valley/v5.mp4", lab.folder / "hub/blobs/beef")
    (root / "v/a.mp4").symlink_to("../../../blobs/beef")
    done = run(lab, command, dataset="folder", root=str(root))
    assert done.exit_code == 1
    assert "a linked file whose target is outside the root; such as v/a.mp4" in done.stderr
    assert "--option media_links=DIR" in done.stderr
    assert not lab.store.exists()


def test_clips_behind_allowed_links_are_encoded_and_found_again(lab):
    root = lab.folder / "hub/snapshots/r"
    (lab.folder / "hub/blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(lab.root.rglob("*")) if path.is_file()):
        link = root / path.relative_to(lab.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, lab.folder / f"hub/blobs/{number}")
        link.symlink_to(os.path.relpath(lab.folder / f"hub/blobs/{number}", link.parent))
    plain = lab.extract(encoders=["siglip"], limit=2)
    linked_store = lab.folder / "linked.zarr"
    options = {"media_links": "../../blobs"}
    linked = lab.extract(encoders=["siglip"], limit=2, root=str(root), options=options, store=str(linked_store))
    assert (linked.clips, linked.failed) == (plain.clips, 0)
    assert lab.hashes(linked_store) == lab.hashes(lab.store)
    assert verify_media(linked_store, "full") == []
    moved = lab.folder / "moved"
    (lab.folder / "hub").rename(moved)
    assert verify_media(linked_store, "full", root=str(moved / "snapshots/r")) == []


def test_a_job_keeps_the_folder_of_links_across_processes(tmp_path):
    root = MediaRoot(str(tmp_path), str(tmp_path / "blobs"))
    (tmp_path / "a.mp4").write_bytes(b"x")
    clip = load_dataset("folder", tmp_path).clips[0]
    job = DecodeJob(root=root, clip=clip, views=(View(rule=ResizeRule(size=8), num_frames=8),))
    assert DecodeJob.from_record(json.loads(json.dumps(job.to_record()))) == job


def test_a_run_whose_clips_have_no_tokens_does_not_say_where_the_media_are(lab):
    folders = [lab.folder / name for name in ("media", "moved", "other")]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        shutil.copy(lab.root / "valley/v5.mp4", folder / "a.mp4")
    (folders[2] / "b.mp4").write_bytes(b"not a film")
    store, settings = str(lab.folder / "own.zarr"), {"dataset": "folder", "encoders": ["siglip"]}
    committed = [lab.extract(store=store, root=str(folder), **settings).committed for folder in folders]
    runs = FeatureStore.open(store).runs()
    assert committed == [run["summary"]["committed"] for run in runs] == [1, 1, 0]
    assert [media_roots(runs[:number], None) for number in (1, 2, 3)] == [
        {"folder": str(folders[0])},
        {"folder": str(folders[1])},  # it had nothing to do, and its media are the same
        {"folder": str(folders[1])},
    ]
    assert media_roots(runs[2:], None) == {"folder": str(folders[2])}


def test_a_run_without_links_has_a_plain_root():
    run = {"root": "/media", "config": {"dataset": "folder", "options": {}}}
    assert (media_root(run), media_root(run, "/now")) == ("/media", "/now")


@pytest.mark.parametrize("command", ["view", "report", "verify"])
def test_a_mistyped_folder_of_media_is_an_error(lab, command):
    run(lab, "extract", limit=2)
    out = lab.folder / "page"
    given = {"view": ["--out", str(out)], "report": ["--out", str(out)], "verify": ["--media", "quick"]}[command]
    done = CliRunner().invoke(main, [command, str(lab.store), "--root", str(lab.folder / "typo"), *given])
    assert done.exit_code == 2
    assert "typo' does not exist" in done.stderr
    assert not out.exists()


def test_a_mistyped_folder_of_media_is_an_error_in_python(lab):
    run(lab, "extract", limit=2)
    with pytest.raises(UserError, match="there is no folder"):
        Explorer(FeatureStore.open(lab.store), root=str(lab.folder / "typo"))
