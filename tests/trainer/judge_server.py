"""A small real server on loopback that stands in for a judge: OpenAI's chat completions, and faults on request."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = "judge-2026-01-01"


class JudgeServer:
    """Says yes with score 5 where the prediction is the right answer, else no with 1.

    `faults` are used up by the first requests, one each: a status, "hang up", "hang", the text of a reply, or bytes
    in the place of a reply.
    """

    def __init__(self, faults: Iterable[int | str | bytes] = (), version: str = VERSION) -> None:
        self.faults, self.version = deque(faults), version
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.may_go = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.may_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge._lock:
                    judge.requests.append({"path": self.path, **body})
                    judge.keys.append(self.headers.get("Authorization"))
                    fault = judge.faults.popleft() if judge.faults else None
                if fault == "hang up":
                    self.close_connection = True
                    return
                if fault == "hang":
                    judge.may_go.wait()
                    return
                if isinstance(fault, int):
                    self.reply(fault, {"error": {"message": f"no: {self.headers.get('Authorization')}"}})
                    return
                if isinstance(fault, bytes):
                    self.reply(200, fault)
                    return
                text = fault if fault is not None else judged(body)
                self.reply(200, {"model": judge.version, "choices": [{"message": {"content": text}}]})

            def reply(self, status: int, record: dict | bytes) -> None:
                data = record if isinstance(record, bytes) else json.dumps(record).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                if 300 <= status < 400:
                    self.send_header("Location", f"{judge.url}/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


def judged(body: dict) -> str:
    """The reply to a prompt of the default template."""
    user = body["messages"][1]["content"].splitlines()
    correct, prediction = (
        next(line.partition(": ")[2] for line in user if line.startswith(name))
        for name in ("Reference answer", "Model's answer")
    )
    return "{'pred': 'yes', 'score': 5}" if correct == prediction else "{'pred': 'no', 'score': 1}"
