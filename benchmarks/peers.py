"""Reading alongside other formats: shuffled whole clips through each format's loader to a collated batch.

    python benchmarks/peers.py            # minutes on two quiet cores; the first time, the peers are installed
    python benchmarks/peers.py --page docs/performance.md --json peers.json --plot docs/performance.svg

Every format holds the same synthetic tokens, one encoder, 2.1 MB per clip, and every reader checks a digest
(peer_formats.py). Local: one core (no loader workers) and two (two workers, or the format's own threads; this project:
its prefetching thread), cold (pages dropped by `posix_fadvise`) and warm (the best of the other passes), uncompressed
and with the format's usual codec. S3: a server on this machine (range_server.py) whose every answer waits
`--latency-ms`; its own work is part of the time, so these figures rank formats and are no rates of S3. Peers run in an
environment of their own, made from peers.txt.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from peer_clips import SHAPE
from peer_formats import FORMATS, WITHOUT_CODEC

from featurestore.layout import NEWEST
from featurestore.newest import list_newest
from featurestore.objects.open import open_objects

HERE = Path(__file__).parent
OURS = "merv"
CODECS = ("none", "default")
CLIP_MB = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3] / 1e6
LOCAL = [(codec, cores, state) for codec in CODECS for cores in (1, 2) for state in ("cold", "warm")]
LIMIT_S = 120  # of one case
KEYS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@click.command(context_settings={"show_default": True})
@click.option("--clips", default=128, help="Clips per format on the disk.")
@click.option("--s3-clips", default=64, help="Clips per format on the S3 server; 0 leaves it out.")
@click.option("--passes", default=4, help="Passes of each case, the first of which is cold.")
@click.option("--latency-ms", default=20.0, help="What each answer of the S3 server waits.")
@click.option("--only", default="", help="Formats, comma separated; all without it.")
@click.option("--environment", default=".peers", type=click.Path(path_type=Path), help="Where peers.txt is installed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for all figures.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the local figures.")
@click.option("--page", type=click.Path(path_type=Path), help="Page whose table is replaced.")
def main(
    clips: int,
    s3_clips: int,
    passes: int,
    latency_ms: float,
    only: str,
    environment: Path,
    json_file: Path | None,
    plot: Path | None,
    page: Path | None,
) -> None:
    """Print MB/s of float16 tokens for each format and case."""
    names = [name for name in FORMATS if not only or name in only.split(",")]
    peers = peer_python(environment)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        rows = {name: {} for name in names}
        for codec in CODECS:
            for name in names:
                rows[name] |= local_cases(name, codec, clips, passes, Path(folder), peers)
                click.echo(f"{codec} {name}: {json.dumps(rows[name])}", err=True)
        if s3_clips:
            with s3_server(Path(folder), latency_ms / 1000) as endpoint:
                for name in names:
                    rows[name]["s3"] = s3_case(name, s3_clips, Path(folder), peers, endpoint)
                    click.echo(f"s3 {name}: {rows[name]['s3']}", err=True)
    result = {
        "settings": {"clips": clips, "s3_clips": s3_clips, "passes": passes, "latency_ms": latency_ms},
        "seconds": round(time.perf_counter() - began),
        "machine": machine(),
        "versions": versions(peers),
        "rows": rows,
    }
    text = table(result)
    click.echo(text)
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if plot:
        subprocess.run([peers, HERE / "peers_plot.py", plot], input=json.dumps(result), text=True, check=True)
    if page:
        picture = f"\n\n![MB/s by format]({os.path.relpath(plot, page.parent)})" if plot else ""
        replace_part(page, "peers", text + picture)


def peer_python(environment: Path) -> Path:
    """The interpreter of the peers' environment, which is made where it is missing."""
    python = environment.absolute() / "bin/python"
    if not python.exists():
        click.echo(f"installing benchmarks/peers.txt into {environment} ...", err=True)
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", HERE / "peers.txt"], check=True)
    return python


def local_cases(name: str, codec: str, clips: int, passes: int, folder: Path, peers: Path) -> dict[str, Any]:
    """Figures of one format and codec on this machine's disk; {} where the format has no codec."""
    if codec != "none" and name in WITHOUT_CODEC:
        return {}
    place, error = written(name, codec, clips, folder, peers)
    if error:
        return {f"{codec} error": error}
    figures: dict[str, Any] = {}
    for cores in (1, 2):
        found = read(name, str(place), codec, clips, cores, passes, peers, os.environ)
        if isinstance(found, str):
            figures[f"{codec} {cores} error"] = found
            continue
        figures[f"{codec} {cores} cold"] = round(clips * CLIP_MB / found["wall_s"][0])
        figures[f"{codec} {cores} warm"] = round(clips * CLIP_MB / min(found["wall_s"][1:]))
        if cores == 1:
            figures[f"{codec} cpu_ms"] = round(1000 * min(found["processor_s"][1:]) / clips, 3)
    return figures


def written(name: str, codec: str, clips: int, folder: Path, peers: Path) -> tuple[Path, str]:
    """(place of the clips in a format, which is made where it is missing; why that failed)."""
    writer = name if FORMATS[name][0] else OURS
    place = folder / f"{writer}-{codec}-{clips}"
    if place.exists():
        return place, ""
    command = [python_of(writer, peers), HERE / "peer_formats.py", "write", writer, place, codec, clips]
    return place, failure_of(run(command, os.environ))


def read(
    name: str, place: str, codec: str, clips: int, cores: int, passes: int, peers: Path, environ: Any
) -> dict[str, list[float]] | str:
    """Seconds of each pass, or why there are none."""
    workers = 0 if cores == 1 else 2
    command = [python_of(name, peers), HERE / "peer_formats.py", "read", name, place, codec, clips, workers, passes]
    done = run(command, environ, cores)
    return failure_of(done) or json.loads(done.stdout.splitlines()[-1])


def python_of(name: str, peers: Path) -> str | Path:
    return sys.executable if name == OURS else peers


def run(command: list[Any], environ: Any, cores: int = 2) -> subprocess.CompletedProcess[str]:
    """The command on the first so many cores of this process."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    pinned = ["taskset", "-c", ",".join(map(str, allowed)), *map(str, command)]
    environment = {**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    try:
        return subprocess.run(pinned, capture_output=True, text=True, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(pinned, 1, "", f"no end after {LIMIT_S} s")


def failure_of(done: subprocess.CompletedProcess[str]) -> str:
    return "" if done.returncode == 0 else " ".join(done.stderr.split()[-30:])[-200:] or "no message"


def s3_case(name: str, clips: int, folder: Path, peers: Path, endpoint: str) -> int | str:
    """MB/s of one pass from the server over two cores, nothing cached."""
    place, error = written(name, "none", clips, folder, peers)
    if error:
        return error
    if name == OURS:
        put_newest(place)
    environ = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": endpoint}
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        found = read(name, f"s3://{place.name}", "none", clips, 2, 1, peers, {**environ, "PEER_CACHE": cache})
    return found if isinstance(found, str) else round(clips * CLIP_MB / found["wall_s"][0])


def put_newest(place: Path) -> None:
    """What a store in a bucket has and one in a folder lacks: the object that spares its readers a listing."""
    (place / NEWEST).write_bytes(list_newest(open_objects(place)).to_bytes())


@contextmanager
def s3_server(folder: Path, latency_s: float) -> Iterator[str]:
    """The address of a server whose buckets are the folders of `folder`; every answer is delayed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, HERE / "range_server.py", folder, str(port), str(latency_s)])
    try:
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            if process.poll() is not None:
                raise click.ClickException("the S3 server of the benchmark did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 1e6) if memory else None,
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
    }


def versions(peers: Path) -> dict[str, str]:
    """Of this project's main libraries, and of the peers as they are installed."""
    names = [line.split("==")[0] for line in (HERE / "peers.txt").read_text().splitlines() if "==" in line]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    found = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True)
    ours = {f"here: {name}": version(name) for name in ("torch", "numpy", "numcodecs", "obstore")}
    return ours | json.loads(found.stdout)


def table(result: dict[str, Any]) -> str:
    """Markdown: the first of each column is bold."""
    columns = [f"{codec} {cores} {state}" for codec, cores, state in LOCAL] + ["s3"]
    rows, settings, about = result["rows"], result["settings"], result["machine"]
    best = {c: max((row[c] for row in rows.values() if isinstance(row.get(c), int)), default=None) for c in columns}

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        if not isinstance(value, int):
            return "-" if value is None and not any("error" in key for key in row) else "failed"
        return f"**{value:,}**" if value == best[column] else f"{value:,}"

    heads = [*columns, "CPU ms/clip", "CPU ms/clip, codec"]
    heads = [head.replace("default", "codec").replace("none", "plain").replace(" 1 ", ", 1 core, ") for head in heads]
    heads = [head.replace(" 2 ", ", 2 cores, ").replace("s3", f"S3 + {settings['latency_ms']:g} ms") for head in heads]
    lines = [f"| MB/s | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        processor = [str(row.get(f"{codec} cpu_ms", "-")) for codec in CODECS]
        lines.append(f"| {name} | {' | '.join([*(cell(row, column) for column in columns), *processor])} |")
    failed = [f"{name}: {key}: {row[key]}" for name, row in rows.items() for key in row if "error" in key]
    failed += [f"{name}: s3: {row['s3']}" for name, row in rows.items() if isinstance(row.get("s3"), str)]
    lines += ["", *(f"- {line}" for line in failed), ""] if failed else [""]
    lines.append(
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, Python "
        f"{about['python']}, load before {about['load_before'][0]}; {settings['clips']} clips of {CLIP_MB:.1f} MB "
        f"({settings['s3_clips']} from S3), {result['seconds']} s in all. "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + "."
    )
    return "\n".join(lines)


def replace_part(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    before, start, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise click.ClickException(f"{page} has no part between <!-- {name} --> and <!-- /{name} -->")
    page.write_text(f"{before}{start}{text}\n{end}{after}")


if __name__ == "__main__":
    main()
