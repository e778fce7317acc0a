"""The release script in a clone: changelog section, version, commit and tag; what it refuses."""

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "release.py"
spec = spec_from_file_location("release", SCRIPT)
script = module_from_spec(spec)
spec.loader.exec_module(script)

CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.2.0 - 2026-01-02\n\n### Fixed\n\n- Another.\n"
)


def test_the_unreleased_section_becomes_the_version():
    text, section = script.released_changelog(CHANGELOG, "0.3.0", "2026-02-03")
    assert section == "### Added\n\n- A thing."
    assert re.findall("^## .*$", text, re.MULTILINE) == [
        "## Unreleased",
        "## 0.3.0 - 2026-02-03",
        "## 0.2.0 - 2026-01-02",
    ]
    assert text.index("## 0.3.0") < text.index("- A thing.") < text.index("## 0.2.0") < text.index("- Another.")


def test_an_empty_section_is_refused():
    with pytest.raises(script.ReleaseError, match="empty"):
        script.released_changelog(CHANGELOG.replace("- A thing.\n", ""), "0.3.0", "2026-02-03")


@pytest.mark.parametrize(("version", "message"), [("0.1.9", "older than 0.2.0"), ("0.3", "X.Y.Z")])
def test_an_older_or_malformed_version_is_refused(version, message):
    with pytest.raises(script.ReleaseError, match=message):
        script.released_project('[project]\nversion = "0.2.0"\n', version)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with what the script reads, and a Makefile whose targets leave a mark."""
    for name, text in {
        "CHANGELOG.md": CHANGELOG,
        "pyproject.toml": '[project]\nversion = "0.2.0"\n',
        "Makefile": "wheel docs:\n\t@touch made-$@\n",
        ".gitignore": "made-*\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/release.py").write_text(SCRIPT.read_text())
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "Begin"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def release(clone, *words):
    command = [sys.executable, "scripts/release.py", *words]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, env=os.environ)


def git(clone, *words):
    return subprocess.run(["git", *words], cwd=clone, capture_output=True, text=True, check=True).stdout.strip()


def test_a_release_is_a_commit_and_a_tag_with_its_section(clone):
    done = release(clone, "0.3.0")
    assert done.returncode == 0, done.stderr
    assert git(clone, "log", "-1", "--format=%s") == "Release 0.3.0"
    assert git(clone, "tag", "--list", "-n9", "v0.3.0").split() == "v0.3.0 0.3.0 ### Added - A thing.".split()
    assert 'version = "0.3.0"' in (clone / "pyproject.toml").read_text()
    assert (clone / "made-wheel").exists()
    assert (clone / "made-docs").exists()
    assert git(clone, "status", "--porcelain") == ""
    assert "empty" in release(clone, "0.4.0").stderr


def test_a_dry_run_changes_nothing(clone):
    done = release(clone, "0.3.0", "--dry-run")
    assert "- A thing." in done.stdout
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "tag") == ""


def test_changes_and_an_existing_tag_are_refused(clone):
    git(clone, "tag", "v0.3.0")
    assert "v0.3.0 exists" in release(clone, "0.3.0").stderr
    (clone / "Makefile").write_text("changed\n")
    assert "has changes" in release(clone, "0.4.0").stderr


def test_the_projects_own_changelog_can_be_released():
    text, section = script.released_changelog((ROOT / "CHANGELOG.md").read_text(), "99.0.0", "2026-02-03")
    assert section.startswith("### ")
    sections = set(re.findall("^### (.*)$", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Fixed", "Deprecated", "Removed"}
