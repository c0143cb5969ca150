"""A small HTTP server that speaks as much of OpenAI's protocol as a judge needs, and misbehaves as it is told."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What one request gets: the content of a reply, or a status without one; after a while."""

    content: str | None = None
    status: int = 200
    finish: str = "stop"
    seconds: float = 0.0


@dataclass
class Server:
    """Where it listens, what it was asked, and the most requests it held at a time."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def judge_server(acts: Sequence[Act]) -> Iterator[Server]:
    """Each request gets the next act, the last act goes on for ever."""
    server, lock, now = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                act = acts[min(len(server.requests), len(acts) - 1)]
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                now[0] += 1
                server.most_at_once = max(server.most_at_once, now[0])
            time.sleep(act.seconds)
            with lock:
                now[0] -= 1
            self.reply(act, body["model"])

        def reply(self, act: Act, model: str) -> None:
            message = {"role": "assistant", "content": act.content}
            usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
            choice = {"index": 0, "message": message, "finish_reason": act.finish}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
            payload = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
            try:
                self.send_response(act.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
