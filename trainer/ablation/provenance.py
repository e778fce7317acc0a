"""Where a report's numbers come from: encoders and their weights, data, LLM, protocol, software, commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from featurestore.quality import parity_words
from mervcache.page import Markup, escaped, note, table
from trainer.ablation.subject import Subject
from trainer.render import PROTOCOLS

RANDOM = "random:"  # begins the label of seeded weights
FRESH = "fresh:"


def random_encoders(subject: Subject) -> dict[str, str]:
    """Encoder -> label of its weights, where these are seeded and not trained."""
    labels = {encoder: str(facts.get("weights", "")) for encoder, facts in _encoders(subject)}
    return {encoder: label for encoder, label in labels.items() if label.startswith(RANDOM)}


def warnings(subject: Subject) -> list[str]:
    """What a reader has to know before any number."""
    found = []
    if random := random_encoders(subject):
        names = ", ".join(f"{encoder} ({label})" for encoder, label in random.items())
        found.append(f"Random encoders: says nothing about the real ones. Seeded, untrained weights: {names}.")
    return found


def provenance(subject: Subject) -> Markup:
    """Encoders, then a table of everything else."""
    rows, seen = [], set()
    for encoder, facts in _encoders(subject):
        identity = facts.get("identity", {})
        row = (
            encoder,
            str(facts.get("weights", "not recorded")),
            str(identity.get("weights_sha256", "not recorded"))[:12],
            str(identity.get("layer", "not recorded")),
            f"{identity.get('num_frames', '?')} by {identity.get('frame_rule', '?')}",
            " x ".join(map(str, identity.get("grid", ["not recorded"]))),
            str(identity.get("width", "")),
            str(identity.get("storage_dtype", "")),
            parity_words(facts.get("parity")),
        )
        rows += [] if row in seen else [row]
        seen.add(row)
    columns = (
        "encoder",
        "weights",
        "sha256 of weights",
        "output",
        "frames",
        "tokens T x H x W",
        "width",
        "stored as",
        "parity",
    )
    encoders = table(columns, rows, right=[6]) if rows else note("No encoders: text only.")
    return Markup(f"{encoders}{table(('', ''), _facts(subject).items())}")


def _encoders(subject: Subject) -> list[tuple[str, Mapping[str, Any]]]:
    """Of all runs, in the order of the sweep."""
    found = [(encoder, facts) for record in subject.records.values() for encoder, facts in record.encoders.items()]
    order = list(subject.results.encoders) if subject.results else []
    return sorted(found, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _facts(subject: Subject) -> dict[str, str]:
    records, configs, results = subject.records.values(), subject.configs.values(), subject.results
    about: dict[str, str] = {}
    if results:
        record, protocol = results.record, str(results.record["protocol"])
        about["protocol"] = f"{protocol}: {PROTOCOLS.get(protocol, 'as recorded')}"
        template = record.get("template")
        about["prompt"] = f"{template['name']}: {template['text']}" if isinstance(template, Mapping) else ""
        about["split"] = str(record["split"])
        about["questions digest"] = str(record.get("questions_digest", ""))
        about["samples digest"] = str(record.get("samples_digest", ""))
    stores = [str(results.record["store"])] if results and results.record.get("store") else []
    about["store"] = _distinct([*stores, *(r.store for r in records)][:1])
    about["snapshot"] = _distinct([str(results.record["snapshot"])] if results else [r.snapshot for r in records])
    if not subject.is_sweep:
        about["data digest"] = _distinct(r.data_digest for r in records)
    about["samples"] = _distinct(f"{r.num_samples:,}" for r in records)
    about["dropped samples"] = _distinct(_counts(r.dropped) for r in records)
    about["tokens"] = _distinct(r.tokens for r in records)
    about["LLM"] = _distinct(
        f"{c.llm}{' (it began with random weights)' if c.llm.startswith(FRESH) else ''}, trained: {c.train_llm}"
        for c in configs
    )
    about["projector"] = _distinct(f"{c.projector.resampler}, head {c.projector.head}" for c in configs)
    about["steps"] = _distinct(f"{r.num_steps:,}" for r in records)
    about["batch"] = _distinct(f"{c.batch_size} samples" for c in configs)
    about["precision"] = _distinct(c.precision for c in configs)
    about["started from"] = _distinct(r.started_from for r in records)
    about["software"] = _distinct(
        ", ".join(f"{name} {version}" for name, version in r.software.items()) for r in records
    )
    return {name: value for name, value in about.items() if value}


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def commands(subject: Subject) -> Markup:
    """Commands that make the same again, and the settings they name."""
    parts = []
    if subject.commands:
        parts.append(f"<pre>{escaped(chr(10).join(subject.commands))}</pre>")
    else:
        held = f"{subject.path}/runs/*/config.yaml"
        parts.append(note(f"The record of the sweep has no axes; the settings of its runs are in {held}."))
    for name, text in subject.files.items():
        parts.append(f"<details><summary>{escaped(name)}</summary><pre>{escaped(text)}</pre></details>")
    return Markup("".join(parts))
