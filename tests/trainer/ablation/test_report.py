"""The page about a sweep or a run: what it says, that it is safe to open, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from featurestore import FeatureStore
from tests.browser import WIDTHS, needs_browser, open_page
from tests.trainer.ablation.conftest import all_subsets, entry, make_answer
from trainer.ablation.document import Column, Document, Plot, Section
from trainer.ablation.render import read_json, to_json
from trainer.ablation.report import write_report
from trainer.ablation.sweep import read_sweep
from trainer.config import TrainConfig
from trainer.data.tokens import TokenShape
from trainer.main import eval_main, train_main
from trainer.runs.run_record import RunRecord

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
NUM_QUESTIONS = 24
RIGHT = {0: 6, 1: 10, 2: 12, 3: 15, 4: 18}  # of 24 questions, by the number of encoders


class Page(HTMLParser):
    """Tags with their attributes, and the text; an unbalanced tag is an error."""

    VOID = frozenset(("meta", "img", "br", "link", "input", "hr"))

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.titles: list[str] = []  # what marks and lines show when they are pointed at
        self.rows: list[list[str]] = []  # cells of tables
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


def begin(folder, name, encoders, *, weights="random:0", num_visual_tokens=8, steps=30, llm="fresh:tiny", **settings):
    """What a run's folder has besides its scores."""
    run = folder.path / "runs" / name
    shape = TokenShape(grid=(2, 2, 2), width=4, is_pooled=True, identity="a1")
    identity = {"num_frames": 16, "frame_rule": "linspace-32/2", "grid": [2, 2, 2], "layer": HOSTILE}
    RunRecord(
        store="nowhere.zarr",
        data_digest="d1",
        num_samples=9,
        dropped={},
        shapes=dict.fromkeys(encoders, shape),
        parameters={},
        num_visual_tokens=num_visual_tokens if encoders else 0,
        num_steps=60,
        encoders={encoder: {"weights": weights, "identity": identity} for encoder in encoders},
        encoder_order=tuple(encoders),
    ).write(run)
    mode = "frozen" if encoders else "text-only"
    config = TrainConfig(llm=llm, train_llm="full", mode=mode, encoders=tuple(encoders), **settings)
    (run / "config.yaml").write_text(config.to_yaml())
    rows = [{"step": step, "loss": 4 / (1 + step), "samples": 2, "tokens": 24} for step in range(steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(num_right, category="colour"):
    return [
        make_answer(index, right=index < num_right, category=category if index % 2 else "shape")
        for index in range(NUM_QUESTIONS)
    ]


def fill(folder, encoders, *, category="colour", seeds=(0, 1), **changes):
    """Every subset retrained, and the masks of the runs of all encoders."""
    for seed in seeds:
        for subset in all_subsets(encoders):
            run = entry(subset, seed, is_trained=True)
            name = folder.add(run, answers(RIGHT[len(subset)], category))
            begin(folder, name, subset, seed=seed, **changes)
        masked = {"+".join(subset): answers(RIGHT[len(subset)] - 2, category) for subset in all_subsets(encoders)}
        folder.mask(name, masked)
    return folder


@pytest.fixture
def hostile(new_sweep):
    """Four encoders, names that would run a script, and a category with one."""
    encoders = (f"a{HOSTILE}", "dinov2", "a-name-much-longer-than-any-published-one-has-ever-been", "siglip")
    return fill(new_sweep(encoders, store=f"{HOSTILE}.zarr"), encoders, category=HOSTILE, llm=HOSTILE)


@needs_browser
def test_a_browser_shows_the_page_without_errors_and_without_moving_it_sideways(hostile, tmp_path):
    written = write_report(hostile.path, draws=200, out=tmp_path / "page.html")
    opened, console = open_page(written.path, tmp_path)
    assert console == []
    assert [page.width for page in opened] == list(WIDTHS)
    for page in opened:
        assert page.scroll_width <= page.width
        assert page.folded > 5
        assert page.scripts == 0
        assert min(page.heights) > 8  # no drawing has collapsed
        assert HOSTILE in page.text
        assert "Random encoders: says nothing about the real ones" in page.text
    assert max(opened[0].heights) > 250


def test_names_are_text_and_nothing_comes_from_elsewhere(hostile, tmp_path):
    page = Page(write_report(hostile.path, draws=200, out=tmp_path / "page.html").path)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    allowed = {"href": r"#part\d+", "style": r"[\w :;.%-]*", "class": r"[\w -]*"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name, pattern in allowed.items():
            assert re.fullmatch(pattern, attributes.get(name) or "") or (name == "href" and name not in attributes)
    assert page.text.count(HOSTILE) > 10
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_scores_lattice_and_curves_say_what_the_answers_say(new_sweep, tmp_path):
    encoders = ("a", "b")
    page = Page(write_report(fill(new_sweep(encoders), encoders).path, draws=200, out=tmp_path / "page.html").path)
    # 6, 10 and 12 of 24 questions right: 25.0, 41.7 and 50.0 %; masked two less: 16.7, 33.3 and 41.7 %.
    marks = [re.match(r"([\w+-]+), (retrained|post-hoc): ([\d.]+) \[", title) for title in page.titles]
    marks = {found.groups() for found in marks if found}
    expected = {"text-only": ("25.0", "16.7"), "a": ("41.7", "33.3"), "b": ("41.7", "33.3"), "a+b": ("50.0", "41.7")}
    for subset, (retrained, masked) in expected.items():
        assert (subset, "retrained", retrained) in marks
        assert (subset, "post-hoc", masked) in marks
    edges = [re.fullmatch(r"([\w+-]+) \+ (\w): ([+-][\d.]+) points", title) for title in page.titles]
    assert {edge.groups() for edge in edges if edge} == {
        ("text-only", "a", "+16.7"),
        ("text-only", "b", "+16.7"),
        ("a", "b", "+8.3"),
        ("b", "a", "+8.3"),
    }
    assert sum(tag == "polyline" for tag, _ in page.tags) == 8  # a curve per run
    assert "Not counted" in page.text  # the LLM of these runs is nowhere


def test_categories_are_means_over_seeds_beside_chance(new_sweep, tmp_path):
    encoders = ("a", "b")
    page = Page(write_report(fill(new_sweep(encoders), encoders).path, draws=200, out=tmp_path / "page.html").path)
    # Of 24 questions the odd ones are about colour; the first 10 are right for one encoder: 5 of 12.
    start = page.rows.index(["", "colour (12)", "shape (12)"]) + 1
    assert [[cell.strip() for cell in row] for row in page.rows[start : start + 5]] == [
        ["chance", "25.0", "25.0"],
        ["text-only", "25.0", "25.0"],
        ["a", "41.7", "41.7"],
        ["b", "41.7", "41.7"],
        ["a+b", "50.0", "50.0"],
    ]


def test_real_weights_carry_no_warning_and_a_missing_run_is_named(new_sweep, tmp_path):
    encoders = ("a", "b")
    folder = fill(new_sweep(encoders), encoders, weights="hub", seeds=(0,))
    assert "Random encoders" not in Page(write_report(folder.path, draws=200, out=tmp_path / "page.html").path).text
    name = next(name for name in folder.runs if name.startswith("a__"))
    (folder.path / "runs" / name / "scores" / "heldout.json").unlink()
    result = CliRunner().invoke(eval_main, ["report", str(folder.path), "--draws", "200"])
    assert result.exit_code == 3, result.output
    assert f"{name} has no answers: it is not scored" in result.output
    written = folder.path.with_name("sweep-report.html")
    assert f"wrote {written}" in result.output
    assert f"Incomplete: retrained: {name} has no answers" in Page(written).text


def test_steps_that_changed_nothing_are_counted(new_sweep, tmp_path):
    encoders = ("a", "b")
    folder = fill(new_sweep(encoders), encoders, seeds=(0,))
    metrics = folder.path / "runs" / next(iter(folder.runs)) / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[7]["loss"], rows[9]["skipped"] = None, 1
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder.path, draws=200, out=tmp_path / "page.html").path)
    assert "2 steps changed nothing" in page.text


@pytest.fixture
def settings(config, tmp_path):
    """Options and a config file of a toy run."""
    path = tmp_path / "toy.yaml"
    path.write_text(replace(config, max_steps=2, mask_encoders="none").to_yaml())
    return ["--recipe", "demo", "--config", str(path)]


def invoke(main, *arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


def test_a_sweep_can_be_made_again_from_its_page(question_store, settings, tmp_path):
    out, again = tmp_path / "sweep", tmp_path / "again"
    axes = ["--seeds", "3", "--post-hoc", "--nested-grids", "4,1"]
    invoke(train_main, "sweep", "--from-cache", question_store, *settings, *axes, "--out", out)
    invoke(eval_main, "report", out, "--draws", 200, "--out", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    command = re.search(r"merv-train sweep (--from-cache \S+ --recipe \S+ --config sweep-1.yaml) --out NEW", page.text)
    (shown,) = re.findall(r"sweep-1\.yaml(sweep:\n.*?)\n(?=\n|Methods)", page.text, re.DOTALL)
    (tmp_path / "sweep-1.yaml").write_text(shown)
    assert f"--from-cache {question_store.name} " in command[1]  # its name, for a page is given to others
    named = command[1].replace(question_store.name, str(question_store))
    options = named.replace("sweep-1.yaml", str(tmp_path / "sweep-1.yaml")).split()
    invoke(train_main, "sweep", *options, "--out", again)
    made = read_sweep(again)
    assert made == read_sweep(out)
    for name in made["runs"]:
        if made["runs"][name]["method"] != "retrained":
            continue
        scores = [(folder / "runs" / name / "scores" / "heldout.json").read_bytes() for folder in (out, again)]
        assert scores[0] == scores[1]
    # Two time steps of 2 x 2 tokens, both encoders fused into as many as each has; and of 1 token, by nested grids.
    head = ["method", "setting", "encoders", "visual tokens"]
    start = next(index for index, row in enumerate(page.rows) if row[:4] == head) + 1
    found = [[cell.strip() for cell in row] for row in page.rows[start : start + 6]]
    assert {(method, setting[-18:-10], encoders, tokens) for method, setting, encoders, tokens, *_ in found} == {
        ("retrained", "", "text-only", "0"),
        ("retrained", "4 tokens", "dinov2", "8"),
        ("retrained", "4 tokens", "vivit", "8"),
        ("retrained", "4 tokens", "dinov2+vivit", "8"),
        ("one-shot, grids", "4 tokens", "dinov2+vivit", "8"),
        ("one-shot, grids", " 1 token", "dinov2+vivit", "2"),
    }
    assert "Accuracy (%) against visual tokens" in page.text
    assert "Accuracy (%) against FLOPs per sample" in page.text


def test_a_run_has_a_page_of_its_own(question_store, settings, tmp_path):
    run = tmp_path / "run"
    invoke(train_main, "--from-cache", question_store, *settings, "--out", run)
    invoke(eval_main, "report", run)
    page = Page(tmp_path / "run-report.html")
    assert "Not scored: run merv-eval run --checkpoint" in page.text
    invoke(eval_main, "run", "--checkpoint", run)
    invoke(eval_main, "report", run)
    scored = Page(tmp_path / "run-report.html")
    accuracy = json.loads((run / "scores" / "heldout.json").read_text())["scores"][0]["accuracy"]
    assert f"dinov2+vivit, as trained: {100 * accuracy:.1f} [" in scored.text
    assert "Lattice of subsets" not in scored.text
    invoke(eval_main, "mask", "--checkpoint", run)
    invoke(eval_main, "report", run)
    masked = Page(tmp_path / "run-report.html")
    assert "Lattice of subsets" in masked.text
    assert "text-only, post-hoc: " in masked.text
    assert "merv-eval mask --checkpoint NEW" in masked.text
    assert f"merv-train --from-cache {question_store.name} --config config.yaml --out NEW" in masked.text
    digest = json.loads((run / "run.json").read_text())["data_digest"]
    assert digest in masked.text


def test_a_page_names_no_folder_of_this_machine(question_store, settings, tmp_path):
    run, words = tmp_path / "a run" / "visual", tmp_path / "a run" / "words"
    options = ["--from-cache", question_store, *settings]
    invoke(train_main, *options, "--out", run)
    invoke(eval_main, "report", run, "--out", tmp_path / "unscored.html")
    invoke(train_main, *options, "--mode", "text-only", "--out", words)
    invoke(eval_main, "run", "--checkpoint", run, "--baseline", words)
    invoke(eval_main, "report", run, "--out", tmp_path / "scored.html")
    sweep = tmp_path / "a run" / "sweep"
    invoke(train_main, "sweep", *options, "--subsets", "alone", "--out", sweep)
    shutil.rmtree(sweep / "runs" / next(iter(read_sweep(sweep)["runs"])) / "scores")
    assert CliRunner().invoke(eval_main, ["report", str(sweep), "--out", str(tmp_path / "sweep.html")]).exit_code == 3
    for name in ("unscored", "scored", "sweep"):
        text = (tmp_path / f"{name}.html").read_text()
        assert str(tmp_path) not in text, name
        assert str(question_store.parent) not in text
        assert question_store.name in text
    assert "baseline words" in Page(tmp_path / "scored.html").text
    assert "Next: merv-train sweep --out sweep" in Page(tmp_path / "sweep.html").text.replace("'", "")


def test_a_page_shows_the_tables_of_other_commands(new_sweep, question_store, tmp_path):
    clips = FeatureStore.open(question_store).clips["clip_id"].to_pylist()
    labels = tmp_path / "labels.csv"
    labels.write_text("clip_id,label\n" + "".join(f"{clip},{'ab'[i % 2]}\n" for i, clip in enumerate(clips)))
    options = [
        "--labels",
        labels,
        "--probes",
        "linear",
        "--folds",
        2,
        "--draws",
        100,
        "--out",
        tmp_path / "probes.json",
    ]
    invoke(eval_main, "probe", question_store, *options)
    probes = json.loads((tmp_path / "probes.json").read_text())["sections"][0]
    folder = fill(new_sweep(("a", "b")), ("a", "b"), seeds=(0,))
    options = ["--draws", 200, "--with", tmp_path / "probes.json", "--out", tmp_path / "page.html"]
    invoke(eval_main, "report", folder.path, *options)
    page = Page(tmp_path / "page.html")
    assert "Probes of frozen features" in page.text
    start = page.rows.index(["encoders", "accuracy (%)", "balanced accuracy (%)"]) + 1  # the probe is a note
    shown = {row[0]: row[1] for row in page.rows[start : start + len(probes["rows"])]}
    assert shown.keys() == {row[0] for row in probes["rows"]}
    for row in probes["rows"]:
        assert shown[row[0]].startswith(f"{100 * row[3]['value']:.2f} [")
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()


def test_a_table_with_a_plot_is_drawn_and_escaped(new_sweep, tmp_path):
    columns = (Column(name="encoders", unit="count"), Column(name="how"), Column(name="seconds", unit="seconds"))
    rows = tuple((count, how, count * 0.5) for count in (1, 2, 3) for how in ("in series", HOSTILE))
    plot = Plot(x="encoders", y="seconds", lines=("how",))
    section = Section(title=HOSTILE, columns=columns, rows=rows, notes=(HOSTILE,), plot=plot)
    document = Document(title="Time", sections=(section,), footnotes=("toy",))
    (tmp_path / "times.json").write_text(to_json(document))
    assert read_json(tmp_path / "times.json") == document
    folder = fill(new_sweep(("a", "b")), ("a", "b"), seeds=(0,))
    page = Page(write_report(folder.path, draws=200, tables=[tmp_path / "times.json"], out=tmp_path / "p.html").path)
    assert {f"in series, {count} encoders: {count * 0.5:g}" for count in (1, 2, 3)} <= set(page.titles)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 2}', '{"format": 1, "title": "t"}', "TABLE"],
)
def test_a_file_that_holds_no_tables_is_refused_by_its_name(new_sweep, tmp_path, content):
    columns = [{"name": "a", "unit": "text"}]
    broken = {"title": "t", "block": "", "metric": "", "columns": columns, "rows": [["x", 2]], "notes": []}
    record = {"format": 1, "title": "t", "facts": {}, "sections": [broken], "missing": [], "methods": []}
    path = tmp_path / "odd.json"
    path.write_text(content if content != "TABLE" else json.dumps({**record, "footnotes": []}))
    folder = fill(new_sweep(("a", "b")), ("a", "b"), seeds=(0,))
    result = CliRunner().invoke(eval_main, ["report", str(folder.path), "--with", str(path)])
    assert result.exit_code == 1
    assert "odd.json holds no tables" in result.output


def test_a_text_only_run_has_a_page_too(question_store, settings, tmp_path):
    run = tmp_path / "run"
    invoke(train_main, "--from-cache", question_store, *settings, "--mode", "text-only", "--out", run)
    invoke(eval_main, "run", "--checkpoint", run)
    invoke(eval_main, "report", run)
    assert "No encoders: text only." in Page(tmp_path / "run-report.html").text


def test_scores_by_two_protocols_want_a_choice(question_store, settings, tmp_path):
    run = tmp_path / "run"
    invoke(train_main, "--from-cache", question_store, *settings, "--out", run)
    invoke(eval_main, "run", "--checkpoint", run)
    path = run / "scores" / "heldout.json"
    letters = {**json.loads(path.read_text()), "protocol": "letters"}
    path.with_name("heldout-letters.json").write_text(json.dumps(letters))
    result = CliRunner().invoke(eval_main, ["report", str(run)])
    assert result.exit_code == 1
    assert "scores by letters and likelihood, which are not comparable; give --protocol" in result.output
    invoke(eval_main, "report", run, "--protocol", "likelihood")
