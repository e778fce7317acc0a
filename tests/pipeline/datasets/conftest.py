"""Small datasets of every layout, made on the spot; media are bytes that are not decoded here."""

import io
import json
import tarfile
from pathlib import Path

import pytest

MINI = Path(__file__).resolve().parents[4] / "shared" / "videollava_mini"


@pytest.fixture
def mini() -> Path:
    if not MINI.is_dir():
        pytest.skip("the real test media (folder shared/videollava_mini next to the project) are not here")
    return MINI


def write(path: Path, content: bytes | str | list | dict = b"media") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def make_videollava(root: Path) -> Path:
    records = [
        {"id": "a1", "video": "videochatgpt_tune/a.mp4", "conversations": talk("<video>\nWhat?", "A dog.")},
        {"id": "a2", "video": "videochatgpt_tune/a.mp4", "conversations": talk("<video>\nWhere?", "Outside.")},
        {
            "id": "b",
            "image": "llava_image_tune/gqa/b.jpg",
            "conversations": talk("<image>\nWho?", "I.", "Why?", "So."),
        },
        {"id": "t", "model": "", "conversations": talk("Hello", "Hi.")},
        {"id": "c", "video": "videochatgpt_tune/c.mp4", "conversations": talk("<video>\nHow?", "Slowly.")},
    ]
    write(root / "videochatgpt_llavaimage_tune.json", records)
    write(root / "valley_llavaimage.json", records[:1])
    for path in ("videochatgpt_tune/a.mp4", "llava_image_tune/gqa/b.jpg", "videochatgpt_tune/c.mp4"):
        write(root / path)
    return root


def make_evaluation(root: Path) -> Path:
    questions = [{"video_name": n, "question_id": i, "question": f"What is {n}?"} for i, n in enumerate("acb")]
    write(root / "Open" / "test_q.json", questions)
    write(root / "Open" / "test_a.json", [{"question_id": i, "answer": f"answer {i}"} for i in range(3)])
    for name in ("a.mp4", "b.avi", "c.mkv"):
        write(root / "Open" / "videos" / name)
    return root


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def make_webdataset(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for shard, keys in (("00000", ("000", "001")), ("00001", ("002",))):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for key in keys:
                add_to_tar(tar, f"{key}.mp4", b"media of " + key.encode())
                add_to_tar(tar, f"{key}.txt", f"caption of {key}".encode())
    return root


def make_folder(root: Path) -> Path:
    for name in ("b/2.mp4", "b/1.MOV", "a.jpg", ".hidden.mp4", ".git/c.mp4", "notes.txt", "val/b/3.mp4"):
        write(root / name)
    return root


def make_demo(root: Path) -> Path:
    return root  # renders itself


MAKERS = {
    "videollava": make_videollava,
    "eval": make_evaluation,
    "webdataset": make_webdataset,
    "folder": make_folder,
    "demo": make_demo,
}
