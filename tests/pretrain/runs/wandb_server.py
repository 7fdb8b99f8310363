"""A server that takes a run as W&B's does, until it fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class FakeWandb(BaseHTTPRequestHandler):
    """Answers the requests of wandb 0.31 that start or resume a run; anything else gets an empty answer.

    failure  (status, body) of the answer to every request; None while the server works
    lines    the lines of history that were sent
    log      the lines of the Logs tab that were sent
    """

    failure: ClassVar[tuple[int, bytes] | None] = None
    lines: ClassVar[list[dict]] = []
    log: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = type(self).failure or (200, self.answer(body))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def answer(self, body: bytes) -> bytes:
        asked = json.loads(body) if body[:1] == b"{" else {}
        for line in asked.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.lines.append(json.loads(line))
        self.log.extend(asked.get("files", {}).get("output.log", {}).get("content", []))
        if "CreateRunFiles" in asked.get("query", ""):
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in asked["variables"]["files"]]
            return json.dumps(
                {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            ).encode()
        if "RunResumeStatus" in asked.get("query", "") and self.lines:
            return json.dumps({"data": {"model": self.resumable(asked["variables"]["name"])}}).encode()
        if "UpsertBucket" not in asked.get("query", ""):
            return b'{"data": {"model": null}}'
        project = {"id": "p", "name": "grass", "entity": {"id": "e", "name": "someone"}}
        bucket = {"id": "b", "name": asked["variables"]["name"], "displayName": "n", "config": "{}", "project": project}
        return json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()

    def resumable(self, name: str) -> dict:
        """What the server knows of the run ``name``: numbers of lines, and the last ones."""
        bucket = {
            "id": "b", "name": name, "displayName": "n", "notes": "", "tags": [], "config": "{}",
            "summaryMetrics": "{}", "wandbConfig": json.dumps({"t": 1}), "logLineCount": len(self.log),
            "historyLineCount": len(self.lines), "historyTail": json.dumps([json.dumps(self.lines[-1])]),
            "eventsLineCount": 0, "eventsTail": "[]",
        }  # fmt: skip
        return {"name": "grass", "entity": {"name": "someone"}, "bucket": bucket}

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def serve(failure: tuple[int, bytes] | None = None) -> tuple[ThreadingHTTPServer, type[FakeWandb], str]:
    """Start a server of its own; returns it, its handler and its address."""
    handler = type("Handler", (FakeWandb,), {"failure": failure, "lines": [], "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, handler, f"http://127.0.0.1:{server.server_port}"
