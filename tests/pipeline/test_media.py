import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mervcache.errors import MediaError, RunStoppedError
from pipeline.media import FrameFolder, LocalFile, frame_order, kind_of_path, resolve_media


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "a.mp4").write_bytes(b"media")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    return folder


def reason(root: Path, path: str) -> str:
    with pytest.raises(MediaError) as caught:
        resolve_media(root, path)
    return str(caught.value)


def test_a_file_is_found_under_the_root(root):
    assert resolve_media(root, "videos/a.mp4") == LocalFile(Path(os.path.realpath(root)) / "videos" / "a.mp4")


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert resolve_media(tmp_path / "link", "videos/a.mp4") == resolve_media(root, "videos/a.mp4")


def test_a_link_inside_the_root_is_followed(root):
    (root / "alias.mp4").symlink_to("videos/a.mp4")
    assert resolve_media(root, "alias.mp4") == resolve_media(root, "videos/a.mp4")


def test_a_link_out_of_the_root_is_refused(root, tmp_path):
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to(tmp_path)
    assert "out of the dataset root" in reason(root, "out.mp4")
    assert "out of the dataset root" in reason(root, "up/secret.mp4")


def test_a_root_with_the_same_beginning_is_another_root(root, tmp_path):
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "b.mp4").write_bytes(b"x")
    (root / "b.mp4").symlink_to(tmp_path / "root2" / "b.mp4")
    assert "out of the dataset root" in reason(root, "b.mp4")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.mp4", "videos/../../secret.mp4", "", "a//b", "a\0b", "\ud800"]
)
def test_a_path_that_climbs_out_is_refused_before_it_is_looked_at(root, path):
    assert reason(root, path).startswith("media path is refused")


@given(st.text())
def test_whatever_the_path_the_answer_is_media_inside_the_root_or_a_media_error(tmp_path_factory, path):
    root = tmp_path_factory.getbasetemp() / "any"
    root.mkdir(exist_ok=True)
    (root / "a.mp4").write_bytes(b"media")
    try:
        media = resolve_media(root, path)
    except MediaError:
        return
    assert media == LocalFile(Path(os.path.realpath(root)) / "a.mp4")


def test_missing_empty_and_special_files_have_reasons_without_absolute_paths(root):
    (root / "empty.mp4").touch()
    os.mkfifo(root / "pipe.mp4")
    (root / "device.mp4").symlink_to("/dev/zero")
    (root / "loop.mp4").symlink_to("loop.mp4")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # a socket's path may have 108 bytes at most
    listener.bind("socket.mp4")
    os.chdir(here)
    listener.close()
    assert reason(root, "videos/b.mp4") == "media file is missing"
    assert reason(root, "videos/a.mp4/b.mp4") == "media file is missing"
    assert reason(root, "empty.mp4") == "media file is empty"
    assert reason(root, "pipe.mp4") == "media is not a regular file"
    assert reason(root, "socket.mp4") == "media is not a regular file"
    assert "out of the dataset root" in reason(root, "device.mp4")
    assert reason(root, "loop.mp4") == "media path is a loop of symbolic links"
    assert reason(root, "x" * 300 + ".mp4") == "media file is missing"


def test_a_root_that_is_gone_stops_the_run(tmp_path):
    with pytest.raises(RunStoppedError, match="is gone"):
        resolve_media(tmp_path / "gone", "a.mp4")


def test_an_empty_root_is_an_unmounted_disk_and_stops_the_run(tmp_path):
    (tmp_path / "mount").mkdir()
    with pytest.raises(RunStoppedError, match="is empty"):
        resolve_media(tmp_path / "mount", "a.mp4")


def test_a_frame_folder_lists_its_images_in_the_order_of_their_numbers(root):
    frames = root / "frames"
    frames.mkdir()
    for name in ("f10.jpg", "f9.jpg", "f1.jpg", ".hidden.jpg", "notes.txt"):
        (frames / name).write_bytes(b"x")
    media = resolve_media(root, "frames")
    assert isinstance(media, FrameFolder)
    assert [path.name for path in media.paths] == ["f1.jpg", "f9.jpg", "f10.jpg"]


def test_a_frame_folder_keeps_its_frames_whatever_else_is_in_it(root):
    frames = root / "frames"
    frames.mkdir()
    for name in ("f2.ppm", "f1.PPM"):
        (frames / name).write_bytes(b"x")
    assert [path.name for path in resolve_media(root, "frames").paths] == ["f1.PPM", "f2.ppm"]
    (frames / "f1.jpg").write_bytes(b"x")
    assert [path.name for path in resolve_media(root, "frames").paths] == ["f1.jpg"]


def test_a_frame_folder_without_images_or_with_a_frame_from_outside_is_refused(root, tmp_path):
    assert reason(root, "videos") == "frame folder holds no images"
    (root / "frames").mkdir()
    (root / "frames" / "0.jpg").symlink_to(tmp_path / "secret.mp4")
    assert "out of the dataset root" in reason(root, "frames")


def test_frames_sort_by_number_and_then_by_text():
    names = ["b2.jpg", "b10.jpg", "a.jpg", "7.jpg", "07.jpg"]
    assert sorted(names, key=frame_order) == ["07.jpg", "7.jpg", "a.jpg", "b2.jpg", "b10.jpg"]


def test_the_extension_tells_the_kind_whatever_its_case():
    assert [kind_of_path(p) for p in ("a.MP4", "b/c.jpeg", "d.json", "e")] == ["video", "image", None, None]
