"use strict";
// The page's behaviour. data.js calls `explorer.start` with the table and the maps, clips/N.js calls `explorer.show`.
// Text from a store is only ever set as text, never as HTML.
const explorer = (() => {
  const $ = id => document.getElementById(id);
  const narrow = matchMedia("(max-width: 800px)");  // as in the style sheet: one column, the clip below the table
  let data, source, filter, map, wanted = null, isFirst = true;

  function element(tag, { text, cls, ...properties } = {}, children = []) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (cls) made.className = cls;
    Object.assign(made, properties);
    made.append(...children);
    return made;
  }

  async function start(given) {
    data = given;
    document.title = `${data.title}: MERV Cache explorer`;
    $("title").textContent = data.title;
    $("subtitle").textContent = data.subtitle;
    $("notices").append(...data.notices.map(text => element("p", { text, cls: "warn" })));
    options("dataset", "all datasets", data.columns.dataset);
    options("kind", "videos and stills", data.columns.kind);
    options("tokens", "all clips", data.columns.tokens);
    $("encoder").append(...Object.keys(data.maps).map(name => new Option(name, name)));
    $("wrong-label").hidden = !data.columns.questions.some(count => count > 0);
    const [view] = await Bokeh.embed.embed_item(data.figures, "figures");
    source = view.model.document.get_model_by_name("clips");
    map = view.model.document.get_model_by_name("map");
    const table = view.model.document.get_model_by_name("table");
    filter = table.view.filter;
    fitColumns(table);
    source.selected.properties.indices.change.connect(() => {
      const { indices } = source.selected;  // of points on top of each other all; none of an empty part of the map
      if (indices.length && !indices.includes(wanted)) load(indices[0]);
      mark();
    });
    for (const id of ["search", "dataset", "kind", "tokens", "wrong"]) $(id).addEventListener("input", applyFilter);
    $("encoder").addEventListener("input", drawMap);
    $("filters").addEventListener("submit", event => event.preventDefault());
    drawMap();
    applyFilter();
    const named = Number.parseInt(location.hash.slice(1), 10);
    choose(Number.isInteger(named) && named < data.columns.clip.length ? named : 0);
  }

  // A narrow table has the clip and its caption alone.
  function fitColumns(table) {
    const widths = table.columns.map(column => column.width);
    const fit = () => {
      const room = $("figures").clientWidth - 12;  // less the margins of the table
      const shown = narrow.matches ? { path: 0.4 * room, caption: 0.6 * room } : null;
      table.columns.forEach((column, place) => {
        column.visible = !shown || column.field in shown;
        column.width = Math.floor(shown?.[column.field] ?? widths[place]);
      });
    };
    narrow.addEventListener("change", fit);
    fit();
  }

  function options(id, all, values) {
    $(id).append(new Option(all, ""), ...[...new Set(values)].sort().map(value => new Option(value, value)));
    $(id).hidden = new Set(values).size < 2;
  }

  function applyFilter() {
    const { clip, caption, dataset, kind, tokens, wrong } = data.columns;
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = { dataset: $("dataset").value, kind: $("kind").value, tokens: $("tokens").value };
    const isShown = clip.map((id, place) => {
      const text = `${id} ${caption[place]}`.toLowerCase();
      return words.every(word => text.includes(word))
        && (!chosen.dataset || chosen.dataset === dataset[place])
        && (!chosen.kind || chosen.kind === kind[place])
        && (!chosen.tokens || chosen.tokens === tokens[place])
        && (!$("wrong").checked || wrong[place] > 0);
    });
    filter.booleans = isShown;
    mark();
    const count = isShown.filter(Boolean).length;
    $("count").textContent = `${count.toLocaleString("en")} of ${clip.length.toLocaleString("en")} clips`;
  }

  function drawMap() {
    const name = $("encoder").value;
    if (!name) return;
    const [x, y] = data.maps[name].map(axis => axis.map(value => value === null ? NaN : value));
    source.data = { ...source.data, x, y };
    map.title.text = `${data.projection} of ${name}'s mean tokens`;
  }

  function choose(place) {
    load(place);
    mark();
  }

  // The clip of the panel, and no other, is selected in the map and the table, where the filter shows it.
  function mark() {
    const wished = filter.booleans[wanted] ? [wanted] : [];
    if (String(source.selected.indices) !== String(wished)) source.selected.indices = wished;
  }

  function load(place) {
    if (wanted === place) return;
    wanted = place;
    const script = element("script", { src: `clips/${place}.js` });
    script.onload = script.onerror = () => script.remove();
    document.head.append(script);
  }

  function show(place, clip) {
    if (place !== wanted) return;
    history.replaceState(null, "", `#${place}`);
    const parts = [element("h2", { text: clip.clip })];
    for (const [encoder, reason] of Object.entries(clip.reasons)) {
      parts.push(element("p", { text: `${encoder} failed: ${reason}`, cls: "warn" }));
    }
    parts.push(...pictures(clip), ...fusion(clip.fusion), ...conversations(clip.samples), ...near(clip.near));
    $("details").replaceChildren(...parts);
    if (narrow.matches && !isFirst) $("details").scrollIntoView();
    isFirst = false;
  }

  // Media, frames and token maps, all at the time of one slider.
  function pictures(clip) {
    const strips = [];
    const figures = [];
    const add = (name, [url, steps], cls) => {
      const strip = element("div", { cls: `strip ${cls}` });
      strip.style.backgroundImage = `url("${url}")`;
      strip.style.backgroundSize = `${steps * 100}% 100%`;
      strip.setAttribute("role", "img");
      strip.setAttribute("aria-label", name);
      strips.push({ strip, steps });
      figures.push(element("figure", {}, [strip, element("figcaption", { text: name })]));
    };
    if (clip.frames) add("frames", clip.frames, "photo");
    for (const [encoder, map] of Object.entries(clip.maps)) add(encoder, map, "");
    const isVideo = clip.kind === "video";
    // A position of the slider per time step of the finest map, so that an arrow key moves to the next one.
    const maps = Object.values(clip.maps);
    const positions = Math.max(1, ...(maps.length ? maps : [clip.frames ?? ["", 1]]).map(([, steps]) => steps));
    const slider = element("input", { type: "range", min: 0, max: positions - 1, step: 1, value: 0 });
    slider.setAttribute("aria-label", "time");
    const label = element("span", { cls: "quiet" });
    const stepAt = (share, steps) => Math.min(steps - 1, Math.floor(share * steps + 1e-6));
    const move = share => {
      for (const { strip, steps } of strips) {
        strip.style.backgroundPosition = steps > 1 ? `${100 * stepAt(share, steps) / (steps - 1)}% 0` : "0 0";
      }
      label.textContent = `${Math.round(100 * share)} %`;
    };
    const player = media(clip, share => { slider.value = stepAt(share, positions); move(share); });
    slider.addEventListener("input", () => {
      const share = Number(slider.value) / positions;
      move(share);
      if (player.seek) player.seek(share);
    });
    move(0);
    const row = element("div", { cls: "slider" }, [slider, label]);
    return [...player.parts, ...(isVideo ? [row] : []), element("div", { cls: "pictures" }, figures)];
  }

  function media(clip, moved) {
    if (!clip.media) return { parts: [element("p", { text: clip.note, cls: "quiet" })] };
    if (clip.kind !== "video") return { parts: [element("img", { src: clip.media, cls: "still", alt: clip.clip })] };
    const [first, last] = clip.span;
    const player = element("video", { src: clip.media, controls: true, muted: true, preload: "metadata" });
    const start = first ?? 0;
    const length = () => (last ?? player.duration) - start;
    player.addEventListener("loadedmetadata", () => { if (start) player.currentTime = start; });
    player.addEventListener("timeupdate", () => {
      if (player.paused || !length()) return;
      if (last !== null && player.currentTime >= last) player.pause();
      moved(Math.min(1, Math.max(0, (player.currentTime - start) / length())));
    });
    const note = element("p", { cls: "quiet", text: "This browser cannot play the file; below are its frames.", hidden: true });
    player.addEventListener("error", () => { player.hidden = true; note.hidden = false; });
    return {
      parts: [player, note],
      seek: share => { if (length()) player.currentTime = start + share * length(); },
    };
  }

  function fusion(values) {
    const encoders = Object.entries(values);
    if (!encoders.length) return [];
    const largest = Math.max(...encoders.map(([, found]) => found.norm ?? 0)) || 1;
    const rows = encoders.map(([encoder, found]) => {
      const bar = element("i");
      bar.style.width = `${100 * (found.norm ?? 0) / largest}%`;
      const weight = found.weight === undefined ? "" : `weight ${found.weight.toFixed(3)}, `;
      return element("div", {}, [
        element("span", { text: `${encoder}: ${weight}norm ${found.norm?.toPrecision(3)}` }),
        element("div", { cls: "bar" }, [bar]),
      ]);
    });
    return [element("h2", { text: "What each encoder adds to the visual tokens" }), ...rows];
  }

  // One heading above those of the same source, stage, split and category.
  function conversations(samples) {
    const headings = [...new Set(samples.map(sample => sample.about))];
    return headings.flatMap(about => [
      element("h2", { text: about }),
      ...samples.filter(sample => sample.about === about).map(sample => element("div", { cls: "talk" }, conversation(sample))),
    ]);
  }

  function conversation(sample) {
    const parts = [];
    for (const [role, text] of sample.turns) parts.push(element("div", { cls: `turn ${role}`, text: `${role}: ${text}` }));
    sample.options.forEach((text, place) => {
      parts.push(element("div", { text: `${place === sample.correct ? "✓" : "·"} ${text}`, cls: place === sample.correct ? "right" : "" }));
    });
    for (const answer of sample.answers) {
      const cls = answer.credit >= 1 ? "right" : "wrong";
      parts.push(element("p", { text: `answer (${answer.by}): ${answer.text}`, cls }));
    }
    return parts;
  }

  function near(found) {
    return Object.entries(found).flatMap(([encoder, clips]) => !clips.length ? [] : [
      element("h2", { text: `Nearest by ${encoder}` }),
      element("div", { cls: "near" }, clips.map(([place, cosine]) => {
        const button = element("button", { type: "button", text: `${data.columns.clip[place]} ${cosine.toFixed(3)}` });
        button.addEventListener("click", () => choose(place));
        return button;
      })),
    ]);
  }

  return { start, show };
})();
