"""decode_clip: choice by name, digests, where bytes lie, and whose fault an error is."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import tarfile

import numpy as np
import pytest

from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline import media
from pipeline.decode.decoders import DECODERS, decode_clip
from pipeline.decode.pyav import ends_early
from pipeline.decode.sampling import DecodeJob, FailedClipError
from pipeline.media import Source
from pipeline.views import ResizeRule, View


@pytest.fixture
def clip_file(studio):
    return studio.film("a.mp4", options={"g": "12", "bf": "2"})


def test_unknown_decoder_lists_the_known_ones(studio, clip_file) -> None:
    with pytest.raises(UserError, match="unknown decoder 'opencv'; known: frames/1, decord, ffmpeg"):
        decode_clip(studio.job(clip_file, decoder="opencv"))


def test_decoder_that_is_not_installed_says_how_to_get_it(studio, clip_file, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(UserError, match=r"pip install 'merv-pipeline\[decord\]'"):
        decode_clip(studio.job(clip_file, decoder="decord"))
    monkeypatch.setenv("PATH", str(studio.folder))
    with pytest.raises(UserError, match="needs the ffmpeg program"):
        decode_clip(studio.job(clip_file, decoder="ffmpeg"))


@pytest.mark.parametrize("decoder", ["decord", "ffmpeg"])
def test_only_the_default_accepts_damaged_files(decoder, studio, clip_file, monkeypatch) -> None:
    _fake_program(studio, monkeypatch, "exit 1")
    with pytest.raises(UserError, match="cannot accept damaged files; use --decoder frames/1"):
        decode_clip(studio.job(clip_file, decoder=decoder, accept_damaged=True))


def _fake_program(studio, monkeypatch, script: str) -> None:
    """An `ffmpeg` of ours first on the PATH."""
    program = studio.folder / "bin" / "ffmpeg"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


PLAYS_PPM = """case "$*" in
*null*) printf 'frame=7\\nprogress=continue\\nframe=40\\nprogress=end\\n' ;;
*) for i in $(seq %d); do printf 'P6\\n2 1\\n255\\nabcdef'; done ;;
esac"""


def test_frames_written_by_the_ffmpeg_program_are_read_by_their_own_size(studio, clip_file, monkeypatch) -> None:
    _fake_program(studio, monkeypatch, PLAYS_PPM % 32)
    view = View(rule=ResizeRule(size=1, filter="bilinear"), num_frames=32)
    decoded = decode_clip(studio.job(clip_file, decoder="ffmpeg", views=(view,)))
    assert (decoded.num_frames, decoded.fps, decoded.decoder) == (40, 30.0, "ffmpeg")
    means = np.frombuffer(b"abcdef", np.uint8).reshape(2, 3).mean(axis=0)
    assert np.abs(decoded.frames[view] - means).max() <= 1


@pytest.mark.parametrize("script", ["exit 1", "true", PLAYS_PPM % 5])
def test_program_that_fails_or_stops_early_fails_the_clip(script, studio, clip_file, monkeypatch) -> None:
    _fake_program(studio, monkeypatch, script)
    with pytest.raises(MediaError, match="ffmpeg cannot decode the file"):
        decode_clip(studio.job(clip_file, decoder="ffmpeg"))


def test_an_ffmpeg_program_that_is_too_old_is_no_fault_of_the_clips(studio, clip_file, monkeypatch) -> None:
    _fake_program(studio, monkeypatch, "echo 'ffmpeg version 4.4.2-0ubuntu0.22.04.1 Copyright'; exit 0")
    with pytest.raises(UserError, match=r"needs FFmpeg 5.1 or newer, .*/bin/ffmpeg is 4.4"):
        decode_clip(studio.job(clip_file, decoder="ffmpeg"))


def test_ffmpeg_program_gives_the_same_frames_where_it_is_installed(studio, clip_file) -> None:
    """Without the program the same job is a clear error: either way this test checks something."""
    import shutil

    if shutil.which("ffmpeg") is None:
        with pytest.raises(UserError, match="needs the ffmpeg program"):
            decode_clip(studio.job(clip_file, decoder="ffmpeg"))
        return
    decoded = decode_clip(studio.job(clip_file, decoder="ffmpeg"))
    assert studio.numbers(decoded) == studio.numbers(decode_clip(studio.job(clip_file)))


def test_digest_is_of_the_files_bytes(studio, clip_file) -> None:
    assert decode_clip(studio.job(clip_file)).media_sha256 == hashlib.sha256(clip_file.read_bytes()).hexdigest()


def test_digest_of_a_folder_is_over_sorted_lines_of_name_size_and_digest(studio) -> None:
    from PIL import Image

    (studio.folder / "clip").mkdir()
    for name in ("10.png", "9.png"):
        Image.new("RGB", (9, 9), (len(name), 0, 0)).save(studio.folder / "clip" / name)
    lines = []
    for name in ("10.png", "9.png"):
        data = (studio.folder / "clip" / name).read_bytes()
        lines.append(f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert decode_clip(studio.job(studio.folder / "clip")).media_sha256 == expected


def test_digest_is_taken_once_per_file_and_anew_when_it_changes(studio, clip_file) -> None:
    first = decode_clip(studio.job(clip_file, end_s=1.0)).media_sha256
    data, status = clip_file.read_bytes(), os.stat(clip_file)
    clip_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the last byte of its metadata
    os.utime(clip_file, ns=(status.st_atime_ns, status.st_mtime_ns))  # it looks untouched, so it is not read again
    assert decode_clip(studio.job(clip_file, start_s=1.0)).media_sha256 == first
    studio.film("a.mp4", frames=50)
    assert decode_clip(studio.job(clip_file)).media_sha256 != first


def test_tar_members_decode_as_the_files_they_hold(studio, clip_file) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), (9, 99, 200)).save(studio.folder / "b.png")
    gif = studio.film("c.gif", "gif", pixels="rgb8")
    with tarfile.open(studio.folder / "s.tar", "w") as tar:
        for path in (clip_file, studio.folder / "b.png", gif):
            tar.add(path, arcname=path.name)
    for name, kind in (("a.mp4", "video"), ("b.png", "image"), ("c.gif", "video")):
        member = decode_clip(studio.job(studio.folder / "s.tar" / name, kind=kind))
        file = decode_clip(studio.job(studio.folder / name, kind=kind))
        assert member.media_sha256 == file.media_sha256
        for view, frames in file.frames.items():
            assert np.array_equal(member.frames[view], frames)
    decord = decode_clip(studio.job(studio.folder / "s.tar" / "a.mp4", decoder="decord"))
    assert studio.numbers(decord) == studio.numbers(decode_clip(studio.job(clip_file)))


def test_failed_clip_carries_the_digest_of_the_bytes_that_failed(studio) -> None:
    path = studio.bytes("a.mp4", b"not a video at all")
    with pytest.raises(FailedClipError) as caught:
        decode_clip(studio.job(path))
    assert caught.value.media_sha256 == hashlib.sha256(b"not a video at all").hexdigest()


def test_missing_file_is_the_clips_fault_and_a_missing_root_is_not(studio, clip_file) -> None:
    job = studio.job(clip_file)
    clip_file.rename(studio.folder / "b.mp4")
    with pytest.raises(MediaError, match="media file is missing"):
        decode_clip(job)
    (studio.folder / "b.mp4").unlink()
    studio.folder.rmdir()
    with pytest.raises(RunStoppedError, match="dataset root"):
        decode_clip(job)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_disk_that_fails_stops_the_run_and_accuses_no_clip(number, studio, clip_file, monkeypatch) -> None:
    class Unreadable(io.BytesIO):
        def read(self, *_):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(media, "open", lambda *_: Unreadable(), raising=False)
    with pytest.raises(RunStoppedError, match=r"cannot read a\.mp4"):
        decode_clip(studio.job(clip_file))


def test_disk_that_fails_inside_the_decoder_stops_the_run(studio, clip_file, monkeypatch) -> None:
    """The decoder only sees a file that ends; the bytes are read again before the clip is blamed."""
    path = studio.bytes("b.mp4", clip_file.read_bytes()[:1500])

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Source, "read_through", fail)
    with pytest.raises(RunStoppedError, match=r"cannot read b\.mp4"):
        decode_clip(studio.job(path))


def test_running_out_of_memory_is_the_clips_fault(studio, clip_file, monkeypatch) -> None:
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setitem(DECODERS, "frames/1", fail)
    with pytest.raises(MediaError, match=r"^decoding needs more memory than a decode process may use$"):
        decode_clip(studio.job(clip_file))


def test_views_share_one_decode_and_one_resize_per_rule(studio, clip_file, monkeypatch) -> None:
    from pipeline.decode import sampling

    rules, resize = [], sampling.resize
    monkeypatch.setattr(sampling, "resize", lambda frame, rule: rules.append(rule) or resize(frame, rule))
    one = ResizeRule(size=8)
    views = (View(rule=one, num_frames=16), View(rule=one, num_frames=32), View(rule=ResizeRule(size=9), num_frames=16))
    frames = decode_clip(studio.job(clip_file, views=views)).frames
    assert [frames[view].shape for view in views] == [(16, 8, 8, 3), (32, 8, 8, 3), (16, 9, 9, 3)]
    assert np.array_equal(frames[views[1]][::2], frames[views[0]])
    assert len(rules) == 32 + 16


def test_job_survives_json_and_refuses_views_that_do_not_divide(studio, clip_file) -> None:
    import json

    job = studio.job(clip_file, start_s=0.5, end_s=1.5, decoder="decord", accept_damaged=True)
    assert DecodeJob.from_record(json.loads(json.dumps(job.to_record()))) == job
    with pytest.raises(UserError, match="must divide the 32 sampled frames, got 12"):
        studio.job(clip_file, views=(View(rule=ResizeRule(), num_frames=12),))
    with pytest.raises(UserError, match="needs distinct views"):
        studio.job(clip_file, views=())


def test_declared_length_is_compared_with_the_bytes_that_are_there(studio) -> None:
    for name, codec in (("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mp4", "libx264")):
        path = studio.film(name, codec)
        with open(path, "rb") as file:
            assert not ends_early(file)
        shorter = studio.bytes(f"cut.{name}", path.read_bytes()[:-50])
        with open(shorter, "rb") as file:
            assert ends_early(file) == (not name.endswith("mp4"))  # FFmpeg itself sees a cut MP4
    with open(studio.bytes("live.mkv", b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7), "rb") as file:
        assert not ends_early(file)  # written live: no size
