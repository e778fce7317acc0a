"""Mutation check: applies each seeded fault of seeded_faults.toml to a copy of the source and runs its tests.

A fault is found by its tokens, whatever file it is in, so moving or reformatting code does not lose it. A fault that is
not found exactly once is an error: update its `old` text, or add the new spelling to its `also` list.

    python tests/stress/seeded_faults.py [--only 1,7] [--check] [--json FILE] [--before FILE] [--jobs 1]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("seeded_faults.toml")
PACKAGES = ("featurestore", "pipeline", "trainer", "jobs", "mervcache")
ANY = "ANY_"  # ANY_x in `old` matches any one identifier, the same wherever it occurs; `new` may use it
CLOSING = (")", "]", "}")
SKIPPED_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# The plug-in runs inside each pytest process and fails it if any of our modules came from elsewhere.
PLUGIN_NAME = "only_the_copy"
PLUGIN = f"""
import os, sys

PACKAGES = {PACKAGES!r}

def pytest_sessionfinish(session):
    root = os.environ["SEEDED_FAULTS_COPY"] + os.sep
    files = [getattr(m, "__file__", None) for n, m in list(sys.modules.items()) if n.split(".")[0] in PACKAGES]
    files = [file for file in files if file]
    outside = [file for file in files if not file.startswith(root)]
    print(f"modules of the copy: {{len(files) - len(outside)}}, of elsewhere: {{len(outside)}}")
    if outside:
        print("not from the copy:", outside[0])
        session.exitstatus = 99
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One entry of the table."""

    id: int
    package: str  # its test folder is tried where no test file of `tests` exists
    text: str  # what is wrong
    old: tuple[str, ...]  # the correct source, and alternative spellings of it
    new: str
    tests: tuple[str, ...]  # test files (without .py, globs allowed) or folders


@dataclass(frozen=True, kw_only=True)
class Located:
    """A fault with its place in the source."""

    fault: Fault
    file: str  # relative to the root
    mutated: str  # the whole file with the fault in it
    test_paths: tuple[str, ...]  # relative to the root


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pytest run."""

    code: int | None  # None: it ran past the timeout
    seconds: float
    output: str


@dataclass(frozen=True, kw_only=True)
class Token:
    text: str
    is_name: bool
    start: int  # offsets in the text
    stop: int


class FaultsError(Exception):
    """The table or the tests cannot be used as they are."""


def read_table() -> list[Fault]:
    """The faults by ascending id."""
    entries = tomllib.loads(TABLE.read_text())["fault"]
    faults = [
        Fault(
            id=entry["id"],
            package=entry["package"],
            text=entry["text"],
            old=(entry["old"], *entry.get("also", ())),
            new=entry["new"],
            tests=tuple(entry["tests"]),
        )
        for entry in entries
    ]
    if [fault.id for fault in faults] != list(range(1, len(faults) + 1)):
        raise FaultsError(f"ids in {TABLE.name} must be 1..{len(faults)} in order")
    return faults


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def tokens_of(text: str) -> list[Token]:
    """Tokens without comments, line breaks, indentation and trailing commas; a fragment may be incomplete Python."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tokens: list[Token] = []
    try:
        for kind, string, (row, column), (last_row, last_column), _ in tokenize.generate_tokens(
            io.StringIO(text).readline
        ):
            if kind in SKIPPED_TOKENS or not string:
                continue
            if string in CLOSING and tokens and tokens[-1].text == ",":
                tokens.pop()
            start, stop = starts[row - 1] + column, starts[last_row - 1] + last_column
            tokens.append(Token(text=string, is_name=kind == tokenize.NAME, start=start, stop=stop))
    except (tokenize.TokenError, IndentationError):
        pass  # an open bracket at the end of a fragment
    return tokens


def match_at(tokens: Sequence[Token], place: int, wanted: Sequence[Token]) -> dict[str, str] | None:
    """What each ANY_x stands for if `wanted` begins at `place`, else None."""
    bound: dict[str, str] = {}
    if place + len(wanted) > len(tokens):
        return None
    for token, want in zip(tokens[place:], wanted, strict=False):
        if want.text.startswith(ANY):
            if not token.is_name or bound.setdefault(want.text, token.text) != token.text:
                return None
        elif token.text != want.text:
            return None
    return bound


def locate(fault: Fault, sources: dict[str, tuple[str, list[Token]]]) -> tuple[str, str]:
    """(file, mutated text of it); FaultsError unless exactly one place matches."""
    found: list[tuple[str, str, int]] = []
    for old in fault.old:
        wanted = tokens_of(textwrap.dedent(old).strip())
        for file, (text, tokens) in sources.items():
            for place in range(len(tokens)):
                if tokens[place].text != wanted[0].text and not wanted[0].text.startswith(ANY):
                    continue
                bound = match_at(tokens, place, wanted)
                if bound is not None:
                    start, stop = tokens[place].start, tokens[place + len(wanted) - 1].stop
                    found.append((file, _replaced(text, start, stop, fault.new, bound), text.count("\n", 0, start) + 1))
    if len(found) != 1:
        places = ", ".join(f"{file}:{line}" for file, _, line in found[:5])
        what = f"found {len(found)} times ({places})" if found else "not found"
        raise FaultsError(f"fault {fault.id} ({fault.text}): {what}; update `old` or `also` in {TABLE.name}")
    return found[0][:2]


def _replaced(text: str, start: int, stop: int, new: str, bound: dict[str, str]) -> str:
    new = textwrap.dedent(new).strip("\n")
    for name in sorted(bound, key=len, reverse=True):
        new = new.replace(name, bound[name])
    line = text[text.rfind("\n", 0, start) + 1 : start]
    indent = line[: len(line) - len(line.lstrip())]
    return text[:start] + new.replace("\n", f"\n{indent}") + text[stop:]


def test_paths(fault: Fault, files: Sequence[str]) -> tuple[str, ...]:
    """Test files and folders that the fault names, below its package's test folder, else anywhere below tests/."""
    found: list[str] = []
    for name in fault.tests:
        for folder in (f"tests/{fault.package}", "tests"):
            base = ROOT / folder
            matches = sorted(
                path.relative_to(ROOT).as_posix()
                for path in [*base.rglob(f"{name}.py"), *base.rglob(name)]
                if path.is_dir() or path.relative_to(ROOT).as_posix() in files
            )
            if matches:
                found += matches
                break
    if not found:
        print(f"fault {fault.id}: no test file matches {', '.join(fault.tests)}; taking the package's folder")
        found = [f"tests/{fault.package}" if (ROOT / "tests" / fault.package).is_dir() else "tests"]
    return tuple(dict.fromkeys(found))


def locate_all(faults: Sequence[Fault], files: Sequence[str]) -> list[Located]:
    names = [name for name in files if name.endswith(".py") and name.split("/")[0] in PACKAGES]
    sources = {name: (text := (ROOT / name).read_text(), tokens_of(text)) for name in names}
    located, problems = [], []
    for fault in faults:
        try:
            file, mutated = locate(fault, sources)
            compile(mutated, file, "exec")
            located.append(Located(fault=fault, file=file, mutated=mutated, test_paths=test_paths(fault, files)))
        except (FaultsError, SyntaxError) as error:
            problems.append(str(error) if isinstance(error, FaultsError) else f"fault {fault.id}: {error}")
    if problems:
        raise FaultsError("\n".join(problems))
    return located


class Copy:
    """The tracked files in a folder of their own, where tests run against a mutated source."""

    def __init__(self, base: Path, number: int, files: Sequence[str]) -> None:
        self.root, self._plugins, self._temporary = (base / f"{name}{number}" for name in ("copy", "plugin", "t"))
        self._clock = int(time.time())
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, self.root / name)
        self._plugins.mkdir()
        self._temporary.mkdir()
        (self._plugins / f"{PLUGIN_NAME}.py").write_text(PLUGIN)

    def write(self, name: str, text: str) -> None:
        """Write a source file with a modification time of its own, so that no cached bytecode is taken for it."""
        self._clock += 2
        (self.root / name).write_text(text)
        os.utime(self.root / name, (self._clock, self._clock))

    def pytest(self, paths: Sequence[str], timeout_s: float) -> Run:
        """Run the tests of the copy; everything they start belongs to one process group."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", PLUGIN_NAME, *paths]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.root), str(self._plugins)]),
            "SEEDED_FAULTS_COPY": str(self.root),
            "TMPDIR": str(self._temporary),
        }
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            return Run(code=code, seconds=time.monotonic() - began, output=output.read())

    def close(self) -> None:
        for folder in (self.root, self._plugins, self._temporary):
            shutil.rmtree(folder, ignore_errors=True)


def check_is_used(copy: Copy) -> None:
    """Every package that exists is imported from the copy."""
    names = [name for name in PACKAGES if (copy.root / name / "__init__.py").is_file()]
    program = f"import importlib; [print(importlib.import_module(n).__file__) for n in {names!r}]"
    environment = os.environ | {"PYTHONPATH": str(copy.root)}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=copy.root, env=environment, capture_output=True, text=True, check=True
    )
    for file in answer.stdout.split():
        if not Path(file).is_relative_to(copy.root):
            raise FaultsError(f"{file} would be tested instead of the copy's")


def verdict(run: Run) -> str:
    """caught, missed or timed out (which counts as caught)."""
    if run.code is None:
        return "timed out"
    if run.code == 0:
        check_own_modules(run)
        return "missed"
    if run.code in (1, 2) or run.code < 0:  # a failed test, a module that cannot be imported, a crash
        return "caught"
    raise FaultsError(f"pytest ended with code {run.code}:\n{run.output[-3000:]}")


def check_own_modules(run: Run) -> int:
    """How many modules of the copy the tests loaded, as the plug-in reports; there must be some."""
    found = re.search(r"modules of the copy: (\d+), of elsewhere: 0", run.output)
    if found is None or found[1] == "0":
        raise FaultsError(f"the tests did not load the copy's modules:\n{run.output[-3000:]}")
    return int(found[1])


def first_failure(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    return lines[0][:160] if lines else ""


def run_green(copy: Copy, located: Sequence[Located]) -> dict[str, float]:
    """Seconds of each test file or folder on the unchanged source; all must pass."""
    seconds: dict[str, float] = {}
    for path in dict.fromkeys(path for each in located for path in each.test_paths):
        run = copy.pytest([path], 1800)
        if run.code != 0:
            raise FaultsError(f"{path} must pass without a fault:\n{run.output[-3000:]}")
        seconds[path] = run.seconds
        print(f"green {run.seconds:6.1f} s, {check_own_modules(run)} modules  {path}", flush=True)
    return seconds


def run_fault(copies: queue.Queue[Copy], each: Located, green_s: float) -> dict:
    copy = copies.get()
    try:
        copy.write(each.file, each.mutated)
        run = copy.pytest(each.test_paths, 60 + 8 * green_s)
        copy.write(each.file, (ROOT / each.file).read_text())
    finally:
        copies.put(copy)
    result = verdict(run)
    by = first_failure(run.output) if result == "caught" else ""
    print(f"{each.fault.id:3} {result:9} {run.seconds:6.1f} s  {each.fault.text}  {by}", flush=True)
    return {
        "id": each.fault.id,
        "package": each.fault.package,
        "text": each.fault.text,
        "file": each.file,
        "tests": list(each.test_paths),
        "verdict": result,
        "seconds": round(run.seconds, 1),
        "by": by,
    }


def compare(results: Sequence[dict], before: Path) -> list[str]:
    """Faults that an earlier run caught and this one missed."""
    earlier = {each["id"]: each["verdict"] for each in json.loads(before.read_text())["faults"]}
    return [
        f"fault {each['id']} ({each['text']}) was caught before and is missed now"
        for each in results
        if each["verdict"] == "missed" and earlier.get(each["id"], "missed") != "missed"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="ids, separated by commas")
    parser.add_argument("--check", action="store_true", help="only look for the faults in the source; run nothing")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--before", type=Path, help="results of an earlier run; exit 1 if it caught what is missed now")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args(arguments)
    faults = read_table()
    if options.only:
        wanted = {int(number) for number in options.only.split(",")}
        faults = [fault for fault in faults if fault.id in wanted]
    files = tracked_files()
    located = locate_all(faults, files)
    if options.check:
        for each in located:
            print(f"{each.fault.id:3} {each.file}  {each.fault.text}  [{' '.join(each.test_paths)}]")
        return 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        base = Path(folder).resolve()
        if (ROOT.parent / "shared").is_dir():  # real media beside the project, which some tests look for there
            (base / "shared").symlink_to(ROOT.parent / "shared")
        copies: queue.Queue[Copy] = queue.Queue()
        made = [Copy(base, number, files) for number in range(options.jobs)]
        for copy in made:
            check_is_used(copy)
            copies.put(copy)
        green_s = run_green(made[0], located)
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [pool.submit(run_fault, copies, each, sum(map(green_s.get, each.test_paths))) for each in located]
            results = [run.result() for run in runs]
        for copy in made:
            copy.close()
    missed = [each["id"] for each in results if each["verdict"] == "missed"]
    summary = {"faults": results, "caught": len(results) - len(missed), "missed": missed}
    summary["green_seconds"] = {path: round(seconds, 1) for path, seconds in green_s.items()}
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"caught {summary['caught']} of {len(results)}; missed: {', '.join(map(str, missed)) or 'none'}")
    lost = compare(results, options.before) if options.before else []
    print("\n".join(lost), end="\n" if lost else "")
    return 1 if lost else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FaultsError as error:
        sys.exit(str(error))
