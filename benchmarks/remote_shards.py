"""Requests, bytes and disk of extracting tar shards from a bucket: the S3 server of the tests, toy encoders.

    python benchmarks/remote_shards.py [--media ../shared/videollava_mini/videochatgpt_tune] [--shards 4]

The videos of a folder are packed into shards with captions. Each step is a command of its own, as an operator gives it;
the server counts its requests and the bytes of the answers.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from featurestore.objects.remote import connect
from tests.featurestore import s3_server

CONFIG = Path(__file__).resolve().parent.parent / "pipeline/demo.yaml"


def pack(videos: list[Path]) -> tuple[bytes, bytes]:
    """A shard of videos with captions, and the index that DALI's wds2idx writes for it."""
    buffer, lines = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for video in videos:
            for ending, data in (("mp4", video.read_bytes()), ("txt", f"Video {video.stem}.".encode())):
                info = tarfile.TarInfo(f"{video.stem}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        places = {member.name: f"{member.offset_data} {member.size} {member.name}" for member in tar}
    for video in videos:
        lines.append(" ".join(f"{ending} {places[f'{video.stem}.{ending}']}" for ending in ("mp4", "txt")))
    return buffer.getvalue(), ("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n").encode()


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def measure(endpoint: str, url: str, folder: Path, steps: Mapping[str, list[str]]) -> None:
    """Run each step and print a row of the table; they share a cache and a store."""
    environment = os.environ | {"MERV_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for what, arguments in steps.items():
        s3_server.counts(endpoint)
        began = time.monotonic()
        main = "from pipeline.cli.extract import main; main()"
        command = ["-c", main, *arguments, "--dataset", "webdataset", "--root", url]
        command += ["--config", str(CONFIG), "--store", str(folder / "store.zarr")]
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{what}: {done.stdout}{done.stderr}")
        seconds, seen = time.monotonic() - began, s3_server.counts(endpoint)
        requests = ", ".join(f"{count} {kind}" for kind, (count, _) in sorted(seen.items()))
        received = sum(num_bytes for _, num_bytes in seen.values())
        index, spool = (disk_bytes(folder / "cache" / name) for name in ("shards", "spool"))
        on_disk = f"{index / 1e3:.0f} kB | {spool / 1e6:.1f} MB"
        print(f"| {what} | {requests} | {received / 1e6:.2f} MB | {on_disk} | {seconds:.0f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, default=Path("../shared/videollava_mini/videochatgpt_tune"))
    parser.add_argument("--shards", type=int, default=4)
    arguments = parser.parse_args()
    import obstore

    port = s3_server.free_port()
    process = subprocess.Popen(
        [sys.executable, s3_server.__file__, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        s3_server.wait_for(f"{endpoint}/moto-api/", process)
        os.environ.update(s3_server.KEYS | {"AWS_ENDPOINT_URL": endpoint})
        s3_server.put_bucket(endpoint, "videos")
        videos, store, total = sorted(arguments.media.glob("*.mp4")), connect("s3://videos"), 0
        for number in range(arguments.shards):
            shard, index = pack(videos[number :: arguments.shards])
            total += len(shard)
            for folder in ("plain", "indexed"):
                obstore.put(store, f"{folder}/{number:05d}.tar", shard)
            obstore.put(store, f"indexed/{number:05d}.idx", index)
        print(f"{len(videos)} videos with captions in {arguments.shards} shards, {total / 1e6:.2f} MB in all\n")
        print("| step | requests | received | indexes on disk | spool on disk | time |\n|---|---|---|---|---|---|")
        run, small = ["extract"], ["--option", "spool_gb=0.01"]
        with tempfile.TemporaryDirectory() as folder:
            steps = {
                "`plan` (index, captions, 4 clips)": ["plan"],
                "`extract --encoders siglip`": [*run, "--encoders", "siglip"],
                "the same command again": [*run, "--encoders", "siglip"],
                "`extract --encoders siglip,dinov2`": [*run, "--encoders", "siglip,dinov2"],
            }
            measure(endpoint, "s3://videos/plain", Path(folder), steps)
        with tempfile.TemporaryDirectory() as folder:
            steps = {
                "`plan` with index files": ["plan"],
                "`extract --encoders siglip --option spool_gb=0.01`": [*run, "--encoders", "siglip", *small],
                "`extract --encoders siglip,dinov2 --option spool_gb=0.01`": [
                    *run,
                    "--encoders",
                    "siglip,dinov2",
                    *small,
                ],
            }
            measure(endpoint, "s3://videos/indexed", Path(folder), steps)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
