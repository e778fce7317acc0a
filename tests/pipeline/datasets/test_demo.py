import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mervcache.errors import UserError
from pipeline.datasets import load_dataset
from pipeline.datasets.demo import (
    FAMILIES,
    RGB,
    SPLITS,
    Scene,
    draw_cover,
    encode_mp4,
    encode_png,
    make_scene,
    paint_rgb,
    paint_yuv420,
    questions_of,
    yuv_of,
)

SMALL = {"train": 12, "heldout": 4, "size": 32, "num_frames": 4}
SCENES = [make_scene(0, split, number) for split in SPLITS for number in range(240)]


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    others = ("demo.json", "directions.csv")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in others)
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def bytes_of(root: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_of(root).items()}


def test_two_renderings_have_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        load_dataset("demo", tmp_path / name, **SMALL)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert len(bytes_of(tmp_path / "a")) == 16


def test_one_scene_encoded_again_and_again_has_the_same_bytes():
    scene = next(scene for scene in SCENES if scene.family == "order")
    planes = paint_yuv420(scene, draw_cover(scene, size=96, num_frames=32))
    assert len({encode_mp4(planes, 32) for _ in range(10)}) == 1


def test_a_second_call_renders_nothing(tmp_path):
    load_dataset("demo", tmp_path, **SMALL)
    before = files_of(tmp_path)
    load_dataset("demo", tmp_path, **SMALL)
    assert files_of(tmp_path) == before


def test_an_interrupted_rendering_is_completed_and_what_was_there_is_kept(tmp_path):
    load_dataset("demo", tmp_path / "whole", **SMALL)
    load_dataset("demo", tmp_path / "cut", **SMALL)
    kept = files_of(tmp_path / "cut")
    for name in ("train/00003.mp4", "train/00011.mp4", "heldout/00000.mp4"):
        (tmp_path / "cut" / name).unlink()
        kept.pop(name)
    (tmp_path / "cut" / "train" / ".00003.mp4.1.part").write_bytes(b"half a file")
    listing = load_dataset("demo", tmp_path / "cut", **SMALL)
    found = files_of(tmp_path / "cut")
    assert {name: found[name] for name in kept} == kept
    found.pop("train/.00003.mp4.1.part")
    assert {name: content for name, (content, _) in found.items()} == bytes_of(tmp_path / "whole")
    assert len(listing.clips) == 16


def test_more_clips_leave_the_first_ones_as_they_were(tmp_path):
    first = load_dataset("demo", tmp_path, **SMALL)
    before = files_of(tmp_path)
    more = load_dataset("demo", tmp_path, **SMALL | {"train": 20})
    assert files_of(tmp_path).items() >= before.items()
    assert set(more.clips) > set(first.clips)
    assert set(more.samples["demo-finetune"]) > set(first.samples["demo-finetune"])
    assert more.samples["demo-eval"] == first.samples["demo-eval"]


def test_other_settings_are_not_mixed_into_a_rendered_root(tmp_path):
    load_dataset("demo", tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"was drawn with .*'seed': 0.*'seed': 1"):
        load_dataset("demo", tmp_path, **SMALL, seed=1)


def test_a_folder_of_somebody_elses_is_not_drawn_into(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"holds train or heldout but no demo\.json"):
        load_dataset("demo", tmp_path, **SMALL)


def test_a_manifest_that_is_broken_is_an_error(tmp_path):
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset("demo", tmp_path, **SMALL)


@pytest.mark.parametrize("option", [{"size": 30}, {"train": -1}, {"num_frames": "many"}, {"heldout": 10**9}])
def test_an_impossible_option_is_an_error_and_nothing_is_drawn(tmp_path, option):
    with pytest.raises(UserError, match=f"demo .*{next(iter(option))}"):
        load_dataset("demo", tmp_path / "root", **SMALL | option)
    assert not (tmp_path / "root").exists()


def test_the_manifest_says_what_was_drawn(tmp_path):
    load_dataset("demo", tmp_path, **SMALL)
    assert json.loads((tmp_path / "demo.json").read_text()) == {
        "settings": {"renderer": 1, "seed": 0, "size": 32, "num_frames": 4},
        "counts": {"train": 12, "heldout": 4},
        "is_complete": True,
    }


def test_the_labels_of_directions_are_those_of_the_clips(tmp_path):
    listing = load_dataset("demo", tmp_path, **SMALL)
    rows = [line.split(",") for line in (tmp_path / "directions.csv").read_text().splitlines()]
    videos = [make_scene(0, split, number) for split in SPLITS for number in range(SMALL[split])]
    moving = [scene for scene in videos if scene.family == "direction"]
    assert rows == [["clip_id", "label"], *([f"demo/{scene.name}", scene.directions[0]] for scene in moving)]
    assert {clip_id for clip_id, _ in rows[1:]} <= {clip.clip_id for clip in listing.clips}


def test_files_are_h264_videos_and_png_stills_that_show_the_scene(tmp_path):
    listing = load_dataset("demo", tmp_path, train=10, heldout=0)
    for clip in listing.clips:
        scene = make_scene(0, "train", int(Path(clip.path).stem))
        drawn_THWC = paint_rgb(scene, draw_cover(scene, size=96, num_frames=32))
        if clip.kind == "image":
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / clip.path)), drawn_THWC[0])
            continue
        with av.open(tmp_path / clip.path) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 32
        difference = np.abs(np.stack(frames).astype(int) - drawn_THWC)
        assert difference.mean() < 3  # of 255: half-size colour and compression
    assert Counter(clip.kind for clip in listing.clips) == {"video": 9, "image": 1}


def test_every_family_and_every_question_category_is_there():
    assert {scene.family for scene in SCENES} == {*FAMILIES, "single"} - {"still"}
    categories = {question.category for scene in SCENES for question in questions_of(scene)}
    assert categories == {"shape", "colour", "count", "position", "direction", "order", "text"}


def test_answers_are_one_word_among_four_options():
    for scene in SCENES:
        for question in questions_of(scene):
            assert question.answer in question.options
            assert len(set(question.options)) == len(question.options) == 4
            assert question.answer.split() == [question.answer]


def test_answers_to_one_wording_are_balanced_and_the_wording_fixes_the_options():
    for split in SPLITS:
        answers: dict[str, Counter] = {}
        options: dict[str, set] = {}
        for scene in (make_scene(0, split, number) for number in range(640)):
            for question in questions_of(scene):
                answers.setdefault(question.text, Counter())[question.answer] += 1
                options.setdefault(question.text, set()).add(question.options)
        for text, counter in answers.items():
            assert max(counter.values()) - min(counter.values()) <= 4, (text, counter)
            assert len(counter) == 4
            assert len(options[text]) == 1


def test_one_answer_says_nothing_of_another_of_the_same_clip():
    pairs = Counter()
    for number in range(4000):
        scene = make_scene(0, "train", number)
        if scene.family == "direction":
            pairs[scene.directions[0], scene.colour] += 1
    assert len(pairs) == 16
    assert all(abs(count - 1200 / 16) < 30 for count in pairs.values())


def test_heldout_clips_differ_from_every_training_clip():
    pictures = {}
    for scene in SCENES:
        picture = paint_rgb(scene, draw_cover(scene, size=32, num_frames=4)).tobytes()
        assert picture not in pictures, (scene, pictures[picture])
        pictures[picture] = scene


def centre_of(cover_HW: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(cover_HW > 0.5)
    return float(x.mean()), float(y.mean())


def moved(scene: Scene, start: int, end: int) -> str:
    cover = draw_cover(scene, size=96, num_frames=32)
    (x0, y0), (x1, y1) = centre_of(cover[start]), centre_of(cover[end])
    if abs(x1 - x0) > abs(y1 - y0):
        return "right" if x1 > x0 else "left"
    return "down" if y1 > y0 else "up"


def test_the_pixels_move_as_the_answers_say():
    for scene in SCENES:
        if scene.family == "direction":
            assert moved(scene, 0, 31) == scene.directions[0]
        elif scene.family == "order":
            assert (moved(scene, 0, 15), moved(scene, 16, 31)) == scene.directions


def test_the_pixels_stand_where_the_answers_say():
    for scene in (scene for scene in SCENES if scene.family == "position"):
        x, y = centre_of(draw_cover(scene, size=96, num_frames=32)[0])
        distances = {"left": 48 - x, "right": x - 48, "top": 48 - y, "bottom": y - 48}
        assert max(distances, key=distances.get) == scene.place


def num_parts(cover_HW: np.ndarray) -> int:
    """Connected areas of the picture, by flooding."""
    left = {(int(y), int(x)) for y, x in np.argwhere(cover_HW > 0)}
    parts = 0
    while left:
        parts, front = parts + 1, [left.pop()]
        while front:
            y, x = front.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            front += near
    return parts


def test_the_shapes_can_be_counted_in_the_pixels():
    counted = [scene for scene in SCENES if scene.family == "count"][:24]
    assert {len(scene.copies) for scene in counted} == {1, 2, 3, 4}
    for scene in counted:
        assert num_parts(draw_cover(scene, size=96, num_frames=32)[0]) == len(scene.copies)


def test_nothing_leaves_the_frame():
    for scene in SCENES[:200]:
        cover = draw_cover(scene, size=96, num_frames=8)
        assert cover.max() == 1
        edges = (cover[:, 0], cover[:, -1], cover[:, :, 0], cover[:, :, -1])
        assert max(edge.max() for edge in edges) < 1, scene


def test_words_differ_from_each_other_in_many_pixels():
    texts = {scene.word: scene for scene in SCENES if scene.word}
    covers = [draw_cover(scene, size=96, num_frames=1)[0] for _, scene in sorted(texts.items())]
    assert sorted(texts) == ["GO", "HI", "NO", "OK"]
    assert all(np.abs(a - b).sum() > 300 for a, b in pairwise(covers))


def test_painting_in_yuv_agrees_with_painting_in_rgb():
    scene = next(scene for scene in SCENES if scene.family == "single")
    cover = draw_cover(scene, size=64, num_frames=1)
    planes = paint_yuv420(scene, cover)
    decoded = av.VideoFrame.from_ndarray(planes[0], format="yuv420p").to_ndarray(format="rgb24")
    inside = cover[0] == 1
    np.testing.assert_allclose(decoded[inside].mean(axis=0), RGB[scene.colour], atol=4)


def test_yuv_of_white_black_and_red_is_as_the_standard_has_it():
    np.testing.assert_allclose(yuv_of((255, 255, 255)), (235, 128, 128), atol=0.01)
    np.testing.assert_allclose(yuv_of((0, 0, 0)), (16, 128, 128), atol=0.01)
    np.testing.assert_allclose(yuv_of((255, 0, 0)), (81.481, 90.203, 240), atol=0.01)


def test_a_png_keeps_every_pixel():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)


def test_training_and_evaluation_samples_are_kept_apart(tmp_path):
    listing = load_dataset("demo", tmp_path, **SMALL)
    train, heldout, captions = (listing.samples[f"demo-{stage}"] for stage in ("finetune", "eval", "align"))
    assert {(s.stage, s.split, s.options, s.answer_index) for s in train} == {("finetune", "train", (), None)}
    assert {(s.stage, s.split, len(s.options)) for s in heldout} == {("eval", "heldout", 4)}
    assert all(s.options[s.answer_index] == s.turns[1].text for s in heldout)
    assert all("/train/" in s.clip_id for s in (*train, *captions))
    assert all("/heldout/" in s.clip_id for s in heldout)
    assert len(captions) == 12
    assert {s.turns[0].text.split("\n")[0] for s in train} == {"<video>", "<image>"}


def test_the_evaluation_stage_alone_lists_the_heldout_clips_alone(tmp_path):
    listing = load_dataset("demo", tmp_path, stage="eval", **SMALL)
    assert {clip.path.split("/")[0] for clip in listing.clips} == {"heldout"}
