"""The card of a store whose names come from untrusted input."""

from __future__ import annotations

from featurestore.clips import Clip
from featurestore.objects.open import open_objects
from featurestore.transfer.dataset_card import card, write_card

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
