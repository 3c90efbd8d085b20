"""A fake Hugging Face hub: the endpoints that downloads use, served from a folder.

`<root>/models/OWNER/NAME/...` and `<root>/datasets/OWNER/NAME/...` are repositories; their names may be in `gated`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?$")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)$")


class Hub:
    """The served folder, and the requests that were received."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.address = root, f"http://127.0.0.1:{port}"
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}  # reported sizes of files that are smaller
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, the Authorization header

    def files(self, kind: str, name: str) -> list[Path]:
        folder = self.root / kind / name
        return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve the hub on a free port while the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            if match := _API.match(path):
                self._api(match[1], match[2], match[3], match[4] or "", body)
            elif match := _FILE.match(path):
                self._file("datasets" if match[1] else "models", match[2], match[3])
            else:
                self._send(404, b"{}")

        def _refused(self, kind: str, name: str) -> bool:
            if not (hub.root / kind / name).is_dir():
                self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
                return True
            if name in hub.gated and self.headers.get("Authorization") != "Bearer hf_right":
                self._send(401, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
                return True
            return False

        def _api(self, kind: str, name: str, what: str | None, below: str, body: Any) -> None:
            if self._refused(kind, name):
                return
            folder = hub.root / kind / name
            entries = [self._entry(path, folder) for path in hub.files(kind, name)]
            if what == "tree":
                self._json([each for each in entries if each["path"].startswith(below)])
            elif what == "paths-info":
                self._json([each for each in entries if each["path"] in body.get("paths", [])])
            else:
                siblings = [{"rfilename": each["path"]} for each in entries]
                self._json({"id": name, "sha": SHA, "siblings": siblings, "private": False, "tags": []})

        def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
            name = path.relative_to(folder).as_posix()
            size = hub.sizes.get(name, path.stat().st_size)
            return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}

        def _file(self, kind: str, name: str, file: str) -> None:
            if self._refused(kind, name):
                return
            path = hub.root / kind / name / file
            if not path.is_file():
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            if file in hub.sizes:
                headers["X-Linked-Size"] = str(hub.sizes[file])
            self._send(200, content, headers)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(root, server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
