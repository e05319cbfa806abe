"""`wandb sync` itself reads the parts of a run that was killed and continued, and sends every step once."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.test_supersede import killed_and_continued

PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}


class Server(ThreadingHTTPServer):
    """As much of W&B's server as `wandb sync` needs; it keeps the lines of history by their place."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.lines: dict[int, dict[str, Any]] = {}

    def answer(self, operation: str) -> dict[str, Any]:
        bucket = {"id": "b", "name": "n", "displayName": "n", "config": "{}", "project": PROJECT}
        bucket["historyLineCount"] = len(self.lines)
        answers = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": not self.lines}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
        }
        return {"data": answers.get(operation, {})}

    def keep(self, sent: dict[str, Any]) -> None:
        part = (sent.get("files") or {}).get("wandb-history.jsonl")
        for place, line in enumerate(part["content"] if part else [], start=part["offset"] if part else 0):
            self.lines[place] = json.loads(line)


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            sent = gzip.decompress(sent)
        found: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            found = self.server.answer(json.loads(sent).get("operationName", ""))
        elif self.path.endswith("/file_stream"):
            self.server.keep(json.loads(sent))
        contents = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents)

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.slow
def test_wandb_sync_sends_every_step_of_a_killed_and_continued_run_once(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_and_continued(run, wandb="offline")
    parts = sorted(map(str, (run / "wandb").glob("offline-run-*")))
    assert len(parts) == 3
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "sync", "--project", "p", "--entity", "e", *parts]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [server.lines[place] for place in sorted(server.lines)]
    assert [row["_step"] for row in rows] == list(range(1, 9)), done.stdout + done.stderr
    assert [row["train/loss"] for row in rows] == [1, 1, 1, 1, 3, 3, 3, 3]
