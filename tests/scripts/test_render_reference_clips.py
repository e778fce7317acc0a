"""The renderer of the reference clips still makes the files that ship with the package."""

from __future__ import annotations

import io
import lzma
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.reference_clips import FILES, media_bytes

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "render_reference_clips.py"
spec = spec_from_file_location("render_reference_clips", SCRIPT)
render = module_from_spec(spec)
spec.loader.exec_module(render)


def test_the_rendered_files_are_those_of_the_archive(tmp_path):
    assert render.files() == {file: media_bytes(name) for name, file in FILES.items()}
    render.main(["--out", str(tmp_path / "made.tar.xz")], standalone_mode=False)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress((tmp_path / "made.tar.xz").read_bytes()))) as tar:
        assert {entry.name: tar.extractfile(entry).read() for entry in tar} == render.files()


def test_the_scene_moves_and_counts_and_the_noise_drifts():
    assert tuple(render.scene(0)[90, 40]) == (235, 60, 40)
    assert tuple(render.scene(10)[90, 100]) == (235, 60, 40)  # 6 pixels a frame to the right
    assert tuple(render.scene(10)[150, 220]) == (30, 70, 225)  # and the square to the left
    assert not np.array_equal(render.scene(1)[190:225], render.scene(2)[190:225])
    assert np.array_equal(render.noise(0)[:, 4:], render.noise(1)[:, :-4])
    assert render.noise(3).std() > 60
    assert np.array_equal(render.still()[:, render.WIDTH // 2 :], render.noise(22)[:, : render.WIDTH // 2])


def test_pillow_reads_the_still_back():
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(render.ppm(render.still())))), render.still())


def test_any_reader_finds_the_planes_that_were_written():
    with av.open(io.BytesIO(media_bytes("noise"))) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == render.NUM_FRAMES
    assert (frames[0].width, frames[0].height, frames[0].format.name) == (render.WIDTH, render.HEIGHT, "yuv420p")
    assert frames[5].to_ndarray().tobytes() == render.i420(render.noise(5))


def test_grey_and_primaries_become_the_numbers_of_bt_601():
    picture = np.zeros((2, 8, 3), np.uint8)
    picture[:, 0:2], picture[:, 2:4], picture[:, 4:6], picture[:, 6:8] = 255, (255, 0, 0), (0, 255, 0), (0, 0, 255)
    planes = np.frombuffer(render.i420(picture), np.uint8)
    assert planes[:8].tolist() == [235, 235, 82, 82, 144, 144, 41, 41]
    assert planes[16:20].tolist() == [128, 90, 54, 240]
    assert planes[20:].tolist() == [128, 240, 34, 110]
