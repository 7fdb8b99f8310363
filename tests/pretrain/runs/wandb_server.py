"""A server that takes a run as W&B's does, until it fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class FakeWandb(BaseHTTPRequestHandler):
    """Answers the requests of wandb 0.31 that start a run; anything else gets an empty answer.

    failure  (status, body) of the answer to every request; None while the server works
    lines    the lines of history that were sent
    """

    failure: ClassVar[tuple[int, bytes] | None] = None
    lines: ClassVar[list[dict]] = []

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
        if "CreateRunFiles" in asked.get("query", ""):
            files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in asked["variables"]["files"]]
            return json.dumps(
                {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            ).encode()
        if "UpsertBucket" not in asked.get("query", ""):
            return b'{"data": {"model": null}}'
        project = {"id": "p", "name": "grass", "entity": {"id": "e", "name": "someone"}}
        bucket = {"id": "b", "name": asked["variables"]["name"], "displayName": "n", "config": "{}", "project": project}
        return json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def serve(failure: tuple[int, bytes] | None = None) -> tuple[ThreadingHTTPServer, type[FakeWandb], str]:
    """Start a server of its own; returns it, its handler and its address."""
    handler = type("Handler", (FakeWandb,), {"failure": failure, "lines": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, handler, f"http://127.0.0.1:{server.server_port}"
