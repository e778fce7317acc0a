"""The card of a store whose names come from untrusted input."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import yaml

from featurestore.clips import Clip
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.transfer.dataset_card import card, write_card
from featurestore.transfer.sync import push
from tests.featurestore.sound_store import sample

HOSTILE = "\x9b2J\u202egnp\x7f\u2028## Trust me\x85[x](javascript:1)<b>|"


def test_names_and_reasons_are_one_line_without_control_characters_or_markup(kit):
    paths = [f"v/{number}{HOSTILE}.mp4" for number in range(2)]
    kit.writer().add_clips([Clip(dataset=f"data{HOSTILE}", path=path, kind="video") for path in paths])
    kit.fill(broken=(paths[1],))
    text = card(kit.open(), place=f"s3://key:secret@bucket/store?{HOSTILE}")
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert not [line for line in text.splitlines() if line.startswith("## Trust")]
    assert "<b>" not in text
    assert "](" not in text
    assert "secret" not in text
    assert "s3://***@bucket/store" in text


def test_the_card_of_a_folder_does_not_name_the_way_to_it(kit, make, tmp_path):
    kit.writer().add_clips([make.video(0)])
    kit.fill()
    write_card(open_objects(kit.path), kit.open(), place=str(kit.path))
    text = (kit.path / "README.md").read_text()
    assert f"FeatureStore.open('{kit.path.name}')" in text
    assert str(kit.path.parent) not in text


def test_what_a_decoder_says_is_kept_without_lines_folders_and_addresses(kit, make):
    kit.writer().add_clips([make.video(0)])
    group = kit.group(make.identity())
    block = group.begin(0)
    block.fail(0, "cannot open /home/alice/media/a.mp4\nof https://u:secret@host/a?sig \x1b[2J")
    assert block.commit().outcome(0).reason == r"cannot open a.mp4 of https://***@host/a?*** \x1b[2J"


@pytest.fixture
def shown(kit, make):
    """A store with a failed clip, two encoders, one with a dot in its name, and two names of samples."""
    clips = [make.video(number) for number in range(3)]
    kit.writer().add_clips([*clips, make.image(0)])
    kit.writer().add_samples("tiny-align", [sample(number, clip) for number, clip in enumerate(clips)])
    kit.writer().add_samples("tiny_finetune", [sample(9)])
    kit.fill(broken=("videos/1.mp4",))
    kit.fill(make.identity(encoder="siglip.v2"))
    return kit


def configs_of(folder) -> dict[str, dict[str, list[str]]]:
    """Config -> split -> files, of the card's front matter."""
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    configs = yaml.safe_load(front).get("configs", [])
    return {
        config["config_name"]: {entry["split"]: entry["path"] for entry in config["data_files"]} for config in configs
    }


def test_the_card_names_the_tables_that_the_viewer_shows(shown, tmp_path):
    folder = tmp_path / "pushed"
    push(shown.path, folder)
    assert configs_of(folder) == {
        "clips": {"clips": ["viewer/clips.parquet"]},
        "quarantine": {"quarantine": ["viewer/quarantine.parquet"]},
        "samples": {
            "tiny_align": ["samples/tiny-align.parquet"],
            "tiny_finetune": ["samples/tiny_finetune.parquet"],
        },
    }
    store = shown.open()
    assert pq.read_table(folder / "viewer/clips.parquet").equals(store.clips)
    assert pq.read_table(folder / "viewer/quarantine.parquet").equals(store.quarantine)
    assert verify_store(folder, "full") == []


def test_a_removed_clip_leaves_the_tables_and_an_empty_one_is_no_config(shown, make, tmp_path):
    folder = tmp_path / "pushed"
    push(shown.path, folder)
    tombstone(shown.path, [make.video(1).clip_id], reason="licence")
    push(shown.path, folder)
    configs = configs_of(folder)
    assert list(configs) == ["clips", "samples"]
    assert configs["samples"]["tiny_align"] == ["samples/tiny-align.2.parquet"]
    assert make.video(1).clip_id not in pq.read_table(folder / "viewer/clips.parquet")["clip_id"].to_pylist()
    assert not (folder / "viewer/quarantine.parquet").exists()


def test_the_datasets_library_reads_every_config(shown, make, tmp_path, monkeypatch):
    """The library that the viewer reads with, which accepts no Parquet file without rows."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "pushed"
    push(shown.path, folder)

    def load(name):
        return datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"))

    names = datasets.get_dataset_config_names(str(folder))
    assert sorted(names) == ["clips", "quarantine", "samples"]
    assert datasets.get_dataset_default_config_name(str(folder)) == "clips"
    store, found = shown.open(), {name: load(name) for name in names}
    assert found["clips"]["clips"].to_list() == store.clips.to_pylist()
    assert found["quarantine"]["quarantine"].to_list() == store.quarantine.to_pylist()
    assert found["samples"]["tiny_align"].to_list() == [each.to_record() for each in store.samples("tiny-align")]
    files = {"data_files": f"{folder}/snapshots/{store.snapshot}.parquet", "cache_dir": str(tmp_path / "cache")}
    table = datasets.load_dataset("parquet", split="train", **files)
    assert table["clip_id"][:] == store.clips["clip_id"].to_pylist()
