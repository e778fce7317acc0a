"""docs/settings.md is made from the dataclasses and has a meaning for every setting."""

import re
import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_page_is_current():
    done = subprocess.run(
        [sys.executable, "scripts/settings_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_has_a_meaning():
    rows = re.findall(r"^\| `(\S+)` \|.*\| (.*) \|$", (ROOT / "docs/settings.md").read_text(), re.MULTILINE)
    sections = {"lora", "projector", "fusion", "optimizer"}  # whose default says where they are described
    assert {name for name, meaning in rows if not meaning} <= sections
    assert {"batch_size", "cluster.walltime", "optimizer.llm_lr", "sweep.seeds"} <= {name for name, _ in rows}
