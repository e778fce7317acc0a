"""A language model as judge of open-ended answers: the protocol of Video-ChatGPT, yes or no and a score from 0 to 5.

Any endpoint with OpenAI's chat completions serves. The prompt is a template with the published structure in words of
our own. Figures move by about ten points from judge to judge, so a score names its judge: model, version that the
endpoint reports, endpoint and template. The key is read from OPENAI_API_KEY and written nowhere; what the endpoint
replies is untrusted text and parsed against a schema.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mervcache.console import ProgressLine
from mervcache.errors import MervCacheError, RunStoppedError, UserError, unknown_name
from mervcache.files import record_digest, sha256_hex
from mervcache.text import one_line
from trainer.model.open_ended import OpenAnswer
from trainer.runs.predictions import RecordLog, log_path

DEFAULT_TEMPLATE = Path(__file__).with_name("judge.txt")
KEY_VARIABLE = "OPENAI_API_KEY"
COMPLETIONS = "/chat/completions"
PLACES = ("question", "correct", "prediction")
MAX_TOKENS = 500  # of the published evaluation
MAX_REPLY_BYTES = 1 << 20
MAX_WAIT_S = 60.0  # between two attempts
ASK_AGAIN = 3  # times, for a reply that does not fit the schema
TRANSIENT = frozenset((408, 409, 425, 429))  # and 5xx
_PLACE = re.compile(r"\{(question|correct|prediction)\}")
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, kw_only=True)
class JudgeTemplate:
    """The two messages to a judge."""

    name: str  # of its file
    system: str
    user: str

    @classmethod
    def read(cls, path: Path | None = None) -> JudgeTemplate:
        """The template in a file, by default the one that comes with the package."""
        path = DEFAULT_TEMPLATE if path is None else Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the template {path} cannot be read: {error}") from error
        parts = re.split(r"^\[(system|user)\]\n", text, flags=re.MULTILINE)
        if parts[1::2] != ["system", "user"] or parts[0].strip():
            raise UserError(f"template {path} must be [system], a text, [user], a text, each heading on its own line")
        system, user = parts[2].strip(), parts[4].strip()
        if missing := [f"{{{name}}}" for name in PLACES if f"{{{name}}}" not in user]:
            raise UserError(f"template {path}: its part [user] has no {' and no '.join(missing)}")
        for name in re.findall(r"\{([a-z_]+)\}", f"{system}\n{user}"):
            if name not in PLACES:
                raise UserError(f"template {path}: {unknown_name('place', name, PLACES)}")
        return cls(name=path.name, system=system, user=user)

    def messages(self, answer: OpenAnswer) -> list[dict[str, str]]:
        """The messages about one answer; in one pass, since an answer may hold "{question}"."""
        values = {"question": answer.question, "correct": answer.correct, "prediction": answer.text}
        user = _PLACE.sub(lambda place: values[place[1]], self.user)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    @property
    def sha256(self) -> str:
        return sha256_hex(f"{self.system}\0{self.user}".encode())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge said of one answer; `is_match` None: nothing that fits the schema, which counts as no and 0."""

    is_match: bool | None
    score: int | None
    version: str  # the model as the endpoint names it; "" where no reply was one


@dataclass(frozen=True, kw_only=True)
class Judge:
    """An endpoint and a model behind it."""

    url: str  # base address, such as https://api.openai.com/v1
    model: str
    template: JudgeTemplate = field(default_factory=JudgeTemplate.read)
    concurrency: int = 8  # requests at once
    attempts: int = 8  # per answer, while the endpoint is busy or cannot be reached
    backoff_s: float = 1.0  # before the second attempt, then twice as long each time
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--judge is the base address of an endpoint such as https://host/v1, got {self.url!r}")
        if parts.username is not None or parts.password is not None:
            raise UserError(f"--judge takes no password in the address; put the key into {KEY_VARIABLE}")
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise UserError(f"--judge {parts.scheme}://{parts.hostname} would send answers and key in clear; use https")

    @cached_property
    def address(self) -> str:
        """Where requests go."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        return urlunsplit(parts._replace(path=path if path.endswith(COMPLETIONS) else path + COMPLETIONS, fragment=""))

    @property
    def facts(self) -> dict[str, Any]:
        """What the judge is, but for the version that it reports."""
        parts = urlsplit(self.address)
        return {
            "model": self.model,
            "endpoint": urlunsplit(parts._replace(query="")),
            "template": {"name": self.template.name, "sha256": self.template.sha256},
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }


def judge_answers(judge: Judge, answers: Sequence[OpenAnswer], folder: Path | None) -> list[Verdict]:
    """A verdict on each answer; what the judge has said is kept in `folder` and never requested twice.

    Raises UserError where the endpoint refuses, RunStoppedError where it stays busy or cannot be reached: the same
    command goes on later.
    """
    keys = [_key(answer) for answer in answers]
    path = None if folder is None else log_path(folder, f"judge-{judge.model}", judge.facts)
    with RecordLog(path, judge.facts, key="key") as records:
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in records.records}
        with ProgressLine("judge", total=len(missing), unit="answers") as line:
            _ask_all(judge, missing, records, line)
        return [_verdict(records.records[key]) for key in keys]


def one_version(verdicts: Sequence[Verdict], judge: Judge) -> str:
    """The version that all verdicts are by. Raises UserError for several: their scores are not comparable."""
    counts = Counter(verdict.version for verdict in verdicts if verdict.version)
    if len(counts) > 1:
        named = ", ".join(f"{version} ({number} answers)" for version, number in counts.most_common())
        raise UserError(
            f"the judge {judge.model} answered as {named}, and scores of different judges are not comparable; name one"
            " version with --judge-model, or remove predictions/judge-*.jsonl from the runs and judge again"
        )
    return next(iter(counts), judge.model)


def parse_verdict(text: str) -> tuple[bool, int] | None:
    """The one dictionary in a reply, if it has exactly the keys pred (yes, no) and score (0 to 5); else None.

    >>> parse_verdict("{'pred': 'yes', 'score': 4}"), parse_verdict("{'pred': 'yes', 'score': 4.8}")
    ((True, 4), None)
    """
    found = _OBJECT.findall(text)
    if len(found) != 1:
        return None
    quoted = found[0] if '"' in found[0] else found[0].replace("'", '"')
    try:
        pairs = json.loads(quoted, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    entries = dict(pairs)
    if len(pairs) != 2 or entries.keys() != {"pred", "score"}:
        return None
    pred, score = entries["pred"], entries["score"]
    if not isinstance(pred, str) or pred.strip().lower() not in ("yes", "no"):
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in range(6):
        return None
    return pred.strip().lower() == "yes", int(score)


def _ask_all(judge: Judge, missing: Mapping[str, OpenAnswer], records: RecordLog, line: ProgressLine) -> None:
    """Ask about what is missing; what was answered is kept, whatever becomes of the rest."""
    asker = _Asker(judge)
    with ThreadPoolExecutor(judge.concurrency, thread_name_prefix="judge") as pool:
        futures = {pool.submit(asker.ask, answer): key for key, answer in missing.items()}
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    records.add([{"key": futures[future], **future.result()}])
                    line.advance(1)
                elif not isinstance(error, MervCacheError):
                    raise error
                else:
                    asker.end(futures)
        finally:
            asker.end(futures)
    if (failure := asker.failure) is not None:
        kept = sum(key in records.records for key in missing)
        raise type(failure)(f"{failure}; {kept} of {len(missing)} answers were judged and are kept") from failure


class _Asker:
    """Requests to one endpoint; safe among threads."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.stop = judge, threading.Event()
        self.failure: MervCacheError | None = None  # the first, which is why no further request is sent
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        handlers: list[Any] = [_NoRedirect()]
        if _is_loopback(urlsplit(judge.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def end(self, futures: Iterable[Future]) -> None:
        """Start no further request and wait for none that failed."""
        self.stop.set()
        for future in futures:
            future.cancel()

    def ask(self, answer: OpenAnswer) -> dict[str, Any]:
        """The judge's record of one answer; an error stops the other threads before it is raised."""
        try:
            return self._ask(answer)
        except MervCacheError as error:
            if not self.stop.is_set():
                self.failure = error
                self.stop.set()
            raise

    def _ask(self, answer: OpenAnswer) -> dict[str, Any]:
        version, text = "", ""
        for _ in range(ASK_AGAIN):
            version, text = self._reply(answer)
            if (found := parse_verdict(text)) is not None:
                return {"is_match": found[0], "score": found[1], "version": version, "text": text}
        return {"is_match": None, "score": None, "version": version, "text": text}

    def _reply(self, answer: OpenAnswer) -> tuple[str, str]:
        """Version and text of a reply; "" for what is none of the expected form."""
        body = {
            "model": self.judge.model,
            "messages": self.judge.template.messages(answer),
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            record = json.loads(reply)
            version, text = record.get("model", self.judge.model), record["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return "", ""
        return one_line(str(version))[:100], text if isinstance(text, str) else ""

    def _post(self, body: bytes) -> bytes:
        """The reply to one request, after waiting for an endpoint that is busy."""
        reason = ""
        for attempt in range(self.judge.attempts):
            if self.stop.is_set():
                break
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            request = urllib.request.Request(self.judge.address, data=body, headers=headers, method="POST")
            wait_s = min(MAX_WAIT_S, self.judge.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                with self._opener.open(request, timeout=self.judge.timeout_s) as response:
                    return response.read(MAX_REPLY_BYTES)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in TRANSIENT and error.code < 500:
                    raise UserError(self._refusal(error)) from error
                wait_s = _retry_after(error.headers.get("Retry-After"), wait_s)
                error.close()
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            if attempt + 1 < self.judge.attempts:
                self.stop.wait(wait_s)
        raise RunStoppedError(
            f"the judge at {self.judge.facts['endpoint']} did not answer in {self.judge.attempts} attempts ({reason});"
            " run the same command later: it goes on with what is missing"
        )

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        with error:
            text = error.read(2000).decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "***")
        advice = f"check {KEY_VARIABLE} and --judge-model" if error.code in (401, 403, 404) else "check --judge"
        return (
            f"the judge at {self.judge.facts['endpoint']} refused the request with HTTP {error.code}:"
            f" {one_line(text)[:300] or 'no reason given'}; {advice}"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def _verdict(record: Mapping[str, Any]) -> Verdict:
    return Verdict(is_match=record["is_match"], score=record["score"], version=record["version"])


def _key(answer: OpenAnswer) -> str:
    """Digest of what a judge reads; the judge itself is in the name of the file."""
    return record_digest([answer.question, answer.correct, answer.text])


def _retry_after(text: str | None, otherwise_s: float) -> float:
    """Seconds of a Retry-After header; dates and odd values are passed over."""
    try:
        seconds = float(text or "")
    except ValueError:
        return otherwise_s
    return min(seconds, MAX_WAIT_S) if seconds >= 0 else otherwise_s


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
