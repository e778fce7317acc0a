"""Rendered samples on disk: a conversation is tokenised once for a tokenizer and a prompt format, not in every run.

One SQLite file in the user's cache for everything that decides ids and labels: the tokenizer's own serialisation and
template, the format and its settings, versions. Rows are named by the conversation and hold a digest; one that differs
from it is rendered again. A cache that cannot be used is named in the log once, and everything is rendered.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from featurestore.clips import Turn
from mervcache.files import RENDERED_FOLDER, record_digest, user_cache
from trainer.data.prompts import IGNORE_INDEX, Rendered, Renderer

VERSION = 1  # of rows, and of how a conversation becomes ids: raise it where `Renderer` gives other ones
PENDING = 256  # rows that are written together
BUSY_S = 1.0  # for another process to finish its rows; then these are left out

logger = logging.getLogger(__name__)


class RenderedCache:
    """A renderer that looks a conversation up before it renders it; only one that `writes` adds rows.

    `key` names the file, see `renderer_key`; None: everything is rendered.
    """

    def __init__(self, renderer: Renderer, key: str | None, *, writes: bool) -> None:
        self._renderer, self._writes = renderer, writes
        self._lock = threading.Lock()  # the plan and the thread that reads ahead share the connection
        self._pending: dict[bytes, tuple[bytes, int, int, bytes, bytes]] = {}
        self._database: sqlite3.Connection | None = None
        if key is not None:
            self.path = user_cache() / RENDERED_FOLDER / f"{key}.sqlite"
            self._open()

    def __call__(self, turns: Sequence[Turn], *, has_clip: bool = True) -> Rendered:
        """As the renderer itself."""
        if self._database is None:
            return self._renderer(turns, has_clip=has_clip)
        name = conversation_key(turns, has_clip)
        with self._lock:
            found = self._read(name)
        if found is not None:
            return found
        rendered = self._renderer(turns, has_clip=has_clip)
        with self._lock:
            self._pending[name] = _row(rendered)
            if len(self._pending) >= PENDING:
                self._write()
        return rendered

    def flush(self) -> None:
        """Write the rows that wait for others."""
        with self._lock:
            self._write()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=BUSY_S, check_same_thread=False)
            columns = "name BLOB PRIMARY KEY, digest BLOB, visual_at INTEGER, is_cut INTEGER, ids BLOB, supervised BLOB"
            self._database.execute(f"CREATE TABLE IF NOT EXISTS rendered ({columns}) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def _read(self, name: bytes) -> Rendered | None:
        query = "SELECT digest, visual_at, is_cut, ids, supervised FROM rendered WHERE name = ?"
        try:
            row = self._database.execute(query, (name,)).fetchone() if self._database is not None else None
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return None if row is None else _rendered(row)

    def _write(self) -> None:
        rows = [(name, *row) for name, row in self._pending.items()]
        self._pending = {}
        if not rows or not self._writes or self._database is None:
            return
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO rendered VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # another run writes the same ones
                self._give_up(error)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning(f"{self.path} keeps no rendered samples ({error}); remove it if it is damaged")
        self._database = None


def renderer_key(renderer: Renderer) -> str | None:
    """Names all that decides what a renderer makes of a conversation; None for a tokenizer that cannot be named."""
    from importlib.metadata import version

    tokenizer = renderer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings: dict[str, Any] = {
        "version": VERSION,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "eos": tokenizer.eos_token_id,
        "bos": renderer.bos_id,
        "blank": renderer.blank,
        "prompt": renderer.prompt,
        "placeholder": renderer.placeholder,
        "position": renderer.position,
        "max_tokens": renderer.max_tokens,
        "template_date": renderer.template_date,
        "end_ids": list(renderer.end_ids),
        "num_embeddings": renderer.num_embeddings,
        "software": {name: version(name) for name in ("tokenizers", "transformers")},
    }
    return record_digest(settings)[:32]


def conversation_key(turns: Sequence[Turn], has_clip: bool) -> bytes:
    """Names a conversation by its content."""
    digest = hashlib.sha256(b"\1" if has_clip else b"\0")
    for turn in turns:
        for text in (turn.role, turn.text):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _row(rendered: Rendered) -> tuple[bytes, int, int, bytes, bytes]:
    """Labels are the ids where they are supervised: a bit each."""
    ids = np.array(rendered.input_ids, dtype="<i4").tobytes()
    supervised = np.packbits(np.array(rendered.labels) != IGNORE_INDEX).tobytes()
    values = (rendered.visual_at, int(rendered.is_cut), ids, supervised)
    return (_digest(*values), *values)


def _rendered(row: tuple[bytes, int, int, bytes, bytes]) -> Rendered | None:
    """None for a row that differs from its digest."""
    digest, visual_at, is_cut, ids, supervised = row
    if digest != _digest(visual_at, is_cut, ids, supervised):
        return None
    input_ids = np.frombuffer(ids, dtype="<i4")
    is_label = np.unpackbits(np.frombuffer(supervised, dtype=np.uint8), count=len(input_ids)).astype(bool)
    labels = np.where(is_label, input_ids, IGNORE_INDEX)
    return Rendered(
        input_ids=tuple(input_ids.tolist()), labels=tuple(labels.tolist()), visual_at=visual_at, is_cut=bool(is_cut)
    )


def _digest(visual_at: int, is_cut: int, ids: bytes, supervised: bytes) -> bytes:
    head = f"{visual_at} {is_cut} {len(ids)} ".encode()
    return hashlib.sha256(head + ids + supervised).digest()[:16]
