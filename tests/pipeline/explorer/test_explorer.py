"""The explorer in a real browser and over HTTP: what it shows is what the store, its media and a run hold."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from featurestore import Clip, FeatureStore
from featurestore.clips import Sample, Turn
from mervcache.errors import UserError
from pipeline.cli.explore import view
from pipeline.explorer import Explorer, serve, write_site
from pipeline.explorer.projection import project
from tests.browser import WIDTHS, drive_page, needs_browser, open_page, read_page
from trainer.runs.predictions import RecordLog

HOSTILE = "<img src=x onerror=\"document.title='broken in'\"></script><b>bold"
DRAWN = "#details h2"  # once a clip is shown


@pytest.fixture(scope="module")
def explorer(extracted):
    with Explorer(FeatureStore.open(extracted.store), quiet=True) as found:
        yield found


@pytest.fixture(scope="module")
def server(explorer):
    found = serve(explorer)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def request(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def details(explorer, place) -> dict:
    script = explorer.respond(f"clips/{place}.js").body.decode()
    return json.loads(script.removeprefix(f"explorer.show({place}, ").removesuffix(");\n"))


@pytest.fixture
def hostile_store(tmp_path, toy_identity, write_store):
    """Four clips without media, one of them in quarantine, with text that a page must show and never run."""
    rng = np.random.default_rng(1)
    clips = [Clip(dataset="toy", path=f"{number}.mp4", kind="video") for number in range(4)]
    identity = toy_identity("one", width=6)
    tokens = {
        ("one", clip.clip_id): {"tokens": rng.standard_normal((*identity.grid, 6)).astype(np.float16)}
        for clip in clips[:3]
    }
    writer = write_store(tmp_path / "toy.zarr", clips, {"one": identity}, tokens, failed={("one", clips[3].clip_id)})
    question = Sample(
        sample_id="0",
        clip_id=clips[0].clip_id,
        turns=(Turn(role="human", text=HOSTILE), Turn(role="gpt", text="red")),
        stage="eval",
        split="heldout",
        source="toy",
        options=("red", "blue"),
        answer_index=0,
    )
    asked = (Turn(role="human", text="And then?"), Turn(role="gpt", text="blue"))
    other = replace(question, sample_id="1", turns=asked, source="other")
    writer.add_samples("toy", [question, other, replace(question, sample_id="2", turns=asked)])
    writer.publish_snapshot()
    return FeatureStore.open(tmp_path / "toy.zarr"), question


def test_umap_is_a_map_or_an_error_that_names_its_extra():
    vectors_CD = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    if importlib.util.find_spec("umap") is None:
        with pytest.raises(UserError, match=r"merv-pipeline\[umap\]"):
            project(vectors_CD, "umap")
    else:
        assert project(vectors_CD, "umap").shape == (12, 2)
    with pytest.raises(UserError, match="tsne"):
        project(vectors_CD, "tsne")


@needs_browser
def test_the_written_page_works_from_a_disk_at_both_widths(explorer, tmp_path):
    index = write_site(explorer, tmp_path / "site", quiet=True)
    pages, lines = open_page(index, tmp_path, ready=DRAWN)
    assert [line for line in lines if "[bokeh" not in line] == []
    row = explorer.rows[0]
    for page, width in zip(pages, WIDTHS, strict=True):
        assert page.scroll_width <= width
        assert row["clip_id"] in page.text
        assert f"{len(explorer.rows)} of {len(explorer.rows)} clips" in page.text
        assert all(f"Nearest by {encoder}" in page.text for encoder in explorer.encoders)


@needs_browser
def test_of_a_file_that_the_browser_refuses_no_player_is_left(explorer, tmp_path):
    index = write_site(explorer, tmp_path / "site", quiet=True)
    place = next(i for i, row in enumerate(explorer.rows) if row["path"].endswith(".mp4"))
    (tmp_path / f"site/media/{place}.mp4").write_bytes(b"no video")
    script = f"""
      page.location.hash = '{place}';
      page.location.reload();
      await until(() => $('video')?.error);
      const note = [...page.document.querySelectorAll('#details p')].find(p => p.textContent.includes('cannot play'));
      await until(() => !note.hidden);
      return [$('video').getBoundingClientRect().height, note.getBoundingClientRect().height > 0];
    """
    assert drive_page(index, tmp_path, script, ready=DRAWN) == [0, True]


@needs_browser
def test_on_a_phone_the_table_has_captions_and_a_row_leads_to_its_clip(explorer, tmp_path):
    index = write_site(explorer, tmp_path / "site", quiet=True)
    script = """
      const cells = await until(() => all('.slick-row .slick-cell').length && all('.slick-row .slick-cell'));
      const titles = all('.slick-column-name').map(title => title.textContent);
      const isInside = all('.slick-row')[0].getBoundingClientRect().right <= page.innerWidth;
      const before = page.scrollY;
      cells.find(cell => cell.textContent === page.NAME).click();
      await until(() => $('#details h2').textContent.endsWith(page.NAME));
      return [titles, isInside, before, Math.round($('#details').getBoundingClientRect().top)];
    """
    name = explorer.rows[1]["path"]
    found = drive_page(index, tmp_path, script.replace("page.NAME", json.dumps(name)), width=390, ready=DRAWN)
    assert found == [["clip", "caption"], True, 0, 0]


@needs_browser
def test_each_position_of_the_slider_shows_the_next_step_of_the_maps(explorer, tmp_path):
    index = write_site(explorer, tmp_path / "site", quiet=True)
    script = """
      const slider = $('input[type=range]'), strips = [...page.document.querySelectorAll('.strip')];
      const places = strips.map(() => []);
      for (let step = 0; step < 20; step++) {
        strips.forEach((strip, i) => places[i].push(Math.round(parseFloat(strip.style.backgroundPosition))));
        slider.stepUp();  // as the arrow key does
        slider.dispatchEvent(new Event('input'));
      }
      return Object.fromEntries(strips.map((strip, i) => [strip.ariaLabel, [...new Set(places[i])]]));
    """
    found = drive_page(index, tmp_path, script, ready="input[type=range]")
    steps = {encoder: steps for encoder, (_, steps) in details(explorer, 0)["maps"].items()}
    for encoder, count in steps.items():
        assert found[encoder] == [round(100 * step / (count - 1)) for step in range(count)]
    assert len(found["frames"]) == max(steps.values())


@needs_browser
def test_table_map_and_panel_have_one_clip_selected(hostile_store, tmp_path):
    store, _ = hostile_store
    with Explorer(store, quiet=True) as explorer:
        index = write_site(explorer, tmp_path / "site", quiet=True)
    script = """
      const { selected } = page.Bokeh.documents[0].get_model_by_name('clips');
      const map = page.Bokeh.documents[0].get_model_by_name('map');
      const settle = () => new Promise(done => setTimeout(done, 200));
      const found = [];
      const look = async () => { await settle(); found.push([[...selected.indices], $('#details h2').textContent]); };
      const search = text => { $('#search').value = text; $('#search').dispatchEvent(new Event('input')); };
      await look();
      selected.indices = []; await look();  // a click on an empty part of the map
      search('2.mp4'); await look();
      selected.indices = [2]; await look();
      search(''); await look();
      selected.indices = [1, 3]; await look();  // two points at one place
      return [found, map.center.some(part => part.type === 'Legend')];
    """
    found, has_legend_on_points = drive_page(index, tmp_path, script, ready=DRAWN)
    places = [([0], 0), ([0], 0), ([], 0), ([2], 2), ([2], 2), ([1], 1)]  # selected, shown
    assert found == [[selected, f"toy/{place}.mp4"] for selected, place in places]
    assert not has_legend_on_points


@needs_browser
def test_conversations_alike_have_one_heading_and_the_map_its_caption(hostile_store, tmp_path):
    store, _ = hostile_store
    with Explorer(store, quiet=True) as explorer:
        index = write_site(explorer, tmp_path / "site", quiet=True)
        abouts = [sample["about"] for sample in details(explorer, 0)["samples"]]
    script = """
      const map = page.Bokeh.documents[0].get_model_by_name('map');
      return [[...page.document.querySelectorAll('#details h2')].map(found => found.textContent),
              page.document.querySelectorAll('.turn').length, map.title_location, map.title.text];
    """
    headings, turns, location, caption = drive_page(index, tmp_path, script, ready=DRAWN)
    assert [heading for heading in headings if heading in abouts] == [abouts[0], abouts[1]]
    assert (len(abouts), abouts[0], turns) == (3, abouts[2], 6)
    assert (location, caption) == ("below", "First two principal components of one's mean tokens")


@needs_browser
def test_the_served_page_works_under_its_own_policy(server, explorer, tmp_path):
    document, lines = read_page(server.url + "#1", tmp_path)
    assert [line for line in lines if "[bokeh" not in line] == []
    assert f"<h2>{explorer.rows[1]['clip_id']}</h2>" in document


@needs_browser
def test_text_of_a_store_is_shown_and_never_run(hostile_store, tmp_path):
    store, _ = hostile_store
    with Explorer(store, quiet=True) as explorer:
        index = write_site(explorer, tmp_path / "site", quiet=True)
    pages, lines = open_page(index, tmp_path, ready=DRAWN)
    assert [line for line in lines if "[bokeh" not in line] == []
    assert all(HOSTILE in page.text for page in pages)


def test_every_file_of_the_page_is_there_and_no_other(explorer):
    paths = list(explorer.paths())
    assert len(paths) == len(set(paths))
    assert all(explorer.respond(path) is not None for path in paths)
    for path in ("", "clips/999.js", "clips/-1.js", "clips/0", "maps/0-99.png", "media/0.txt", "../x", "clips/٣.js"):
        assert explorer.respond(path) is None, path


def test_neighbours_are_those_of_plain_numpy(explorer):
    for encoder in explorer.encoders:
        vectors = explorer.vectors[encoder]
        unit = vectors.values_CD.astype(np.float64)
        unit -= unit.mean(axis=0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = unit @ unit[0]
        wanted = [place for place in np.argsort(-cosines)[1:9] if cosines[place] > 0]  # a negative one is not near
        names = [explorer.rows[place]["clip_id"] for place, _ in details(explorer, 0)["near"][encoder]]
        assert names == [vectors.clip_ids[place] for place in wanted]


def test_a_strip_of_maps_has_a_pixel_per_token_and_of_frames_a_square_per_step(explorer):
    row, found = explorer.rows[0], details(explorer, 0)
    for encoder, (path, steps) in found["maps"].items():
        time, height, width = explorer.store.encoders[encoder].grid_of(row["kind"])
        assert steps == time
        assert Image.open(io.BytesIO(explorer.respond(path).body)).size == (width * time, height)
    path, steps = found["frames"]
    width, height = Image.open(io.BytesIO(explorer.respond(path).body)).size
    assert width == height * steps


def test_media_are_served_in_the_parts_that_a_browser_wants(server, explorer, extracted):
    place = next(i for i, row in enumerate(explorer.rows) if row["path"].endswith(".mp4"))
    path = Path(extracted.root, explorer.rows[place]["path"])
    whole = path.read_bytes()
    response, body = request(server, f"/media/{place}.mp4")
    assert (response.status, body) == (200, whole)
    for wanted, part in (("bytes=10-19", whole[10:20]), ("bytes=-7", whole[-7:]), ("bytes=5-", whole[5:])):
        response, body = request(server, f"/media/{place}.mp4", Range=wanted)
        assert (response.status, body) == (206, part), wanted
    assert request(server, f"/media/{place}.mp4", Range=f"bytes={len(whole)}-")[0].status == 416
    response, body = request(server, f"/media/{place}.mp4", "HEAD")
    assert (response.getheader("Content-Length"), body) == (str(len(whole)), b"")


def test_the_server_answers_this_machine_alone_and_only_reads(server, extracted):
    assert urlsplit(server.url).hostname == "127.0.0.1"
    assert request(server, "/", Host="evil.example")[0].status == 403
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/clips/0.js/../../x", "//etc/passwd"):
        assert request(server, path)[0].status == 404, path
    for method in ("POST", "PUT", "DELETE"):
        assert request(server, "/", method)[0].status == 501
    policy = request(server, "/")[0].getheader("Content-Security-Policy")
    assert "script-src 'self';" in policy


def test_a_clip_in_quarantine_says_why(hostile_store):
    store, _ = hostile_store
    with Explorer(store, quiet=True) as explorer:
        reasons = {row["clip_id"]: row["reason"] for row in store.quarantine.to_pylist()}
        (place,) = (i for i, row in enumerate(explorer.rows) if row["clip_id"] in reasons)
        assert details(explorer, place)["reasons"] == {"one": reasons[explorer.rows[place]["clip_id"]]}
        assert details(explorer, place)["maps"] == {}


def test_clips_without_media_are_counted_with_the_option_that_finds_them(extracted, tmp_path):
    store, place = FeatureStore.open(extracted.store), 0
    kept = tmp_path / store.clips["path"][place].as_py()
    kept.parent.mkdir(parents=True)
    kept.write_bytes(Path(extracted.root, kept.relative_to(tmp_path)).read_bytes())
    with Explorer(store, root=str(tmp_path), quiet=True) as explorer:
        assert explorer.missing_media == {str(tmp_path): len(store) - 1}
        assert f"{len(store) - 1} clips without media" in explorer.respond("data.js").body.decode()
        assert "--root" in details(explorer, place + 1)["note"]
        assert details(explorer, place)["note"] == ""
    done = CliRunner().invoke(view, [str(extracted.store), "--root", str(tmp_path), "--out", str(tmp_path / "site")])
    assert f"{len(store) - 1} clips without media under {tmp_path}; name the folder with --root" in done.stderr


def test_a_clip_that_has_no_player_says_why(lab):
    lab.copy_of_root()
    shutil.copy(lab.root / "valley/v5.mp4", lab.root / "valley/v5.avi")
    lab.annotate(lab.root, ["valley/v5.avi", "valley/v5.mp4"], [])
    lab.extract(encoders=("siglip",))
    store = FeatureStore.open(lab.store)
    for plays_media, reason in ((True, ""), (False, "The page was written without --media; its frames")):
        with Explorer(store, plays_media=plays_media, quiet=True) as explorer:
            notes = {Path(row["path"]).suffix: details(explorer, i)["note"] for i, row in enumerate(explorer.rows)}
        assert notes[".avi"].startswith("Browsers do not play .avi files; its frames")
        assert notes[".mp4"].startswith(reason)
        assert bool(notes[".mp4"]) == bool(reason)


def test_answers_and_fusion_weights_of_a_run_are_shown_by_clip(hostile_store, tmp_path):
    store, question = hostile_store
    run = tmp_path / "run"
    answer = {"sample_id": "0", "predicted": 1, "tied": [0], "correct": 0, "scores": [0.5, 0.5], "text": None}
    with RecordLog(
        run / "predictions/toy.jsonl", {"benchmark": "toy", "protocol": "likelihood", "step": 7}, key="question"
    ) as log:
        log.add([{"question": question.digest, "answer": answer}])
    (run / "atlas").mkdir()
    columns = {"clip_id": [question.clip_id], "weight_one": [0.25], "norm_one": [3.0], "motion": [1.0]}
    pq.write_table(pa.table(columns), run / "atlas/step7.parquet")
    with Explorer(store, run=run, quiet=True) as explorer:
        found = details(explorer, 0)
        assert found["fusion"] == {"one": {"weight": 0.25, "norm": 3.0}}
        (shown,) = found["samples"][0]["answers"]
        assert (shown["text"], shown["credit"]) == ("blue", 0.5)


def test_a_run_without_anything_to_show_and_a_folder_in_use_are_errors(hostile_store, tmp_path):
    store, _ = hostile_store
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="merv-eval run"):
        Explorer(store, run=tmp_path / "empty", quiet=True)
    with pytest.raises(UserError, match="no run"):
        Explorer(store, run=tmp_path / "absent", quiet=True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    with Explorer(store, quiet=True) as explorer, pytest.raises(UserError, match="not empty"):
        write_site(explorer, tmp_path / "used", quiet=True)
    assert (tmp_path / "used/file").read_text() == "mine"
    done = CliRunner().invoke(view, [str(store.path), "--out", str(tmp_path / "used")])
    assert (done.exit_code, "not empty" in done.stderr, "pool" in done.stderr) == (1, True, False)


def test_a_page_of_some_clips_says_so(hostile_store):
    store, _ = hostile_store
    with Explorer(store, max_clips=2, quiet=True) as explorer:
        assert len(explorer.rows) == 2
        assert "2 of 4 clips" in explorer.respond("data.js").body.decode()


def test_view_names_its_own_extra_where_nothing_is_installed():
    without = "import sys; sys.modules.update(PIL=None, av=None, bokeh=None)"  # None: the import fails
    code = f"{without}; from pipeline.cli.extract import main; main(['view', 'lab.zarr'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: bokeh is not installed: pip install 'merv-pipeline[view]'\n"
