"""A fake Hugging Face hub: the endpoints that downloads and uploads use, served from a folder.

`<root>/models/OWNER/NAME/...` and `<root>/datasets/OWNER/NAME/...` are repositories; their names may be in `gated`.
Uploads need the token hf_right, and send safetensors as LFS files. Other branches of a model than main are not served:
`<root>/branches/BRANCH/OWNER/NAME/...` has their files.
"""

from __future__ import annotations

import base64
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

import yaml

SHA = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?$")
_UPLOAD = re.compile(
    r"(?:/api/(?P<create>repos/create)|/api/(?P<yaml>validate-yaml)|/lfs/(?P<lfs>\w+)|/.*(?P<batch>\.git/info/lfs/.*)"
    r"|/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|branch|commit)/(?P<revision>.+))$"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)$")


class Hub:
    """The served folder, and the requests that were received."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.address = root, f"http://127.0.0.1:{port}"
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}  # reported sizes of files that are smaller
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, the Authorization header
        self.private: set[str] = set()
        self.refused: dict[str, int] = {}  # status by a part of the path, for uploads that fail
        self.stored: dict[str, bytes] = {}  # LFS files by SHA-256

    def branch(self, name: str, revision: str) -> Path:
        return self.root / "models" / name if revision == "main" else self.root / "branches" / revision / name

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

        def do_PUT(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            if status := next((status for part, status in hub.refused.items() if part in path), None):
                self._send(status, b'{"error": "refused"}')
            elif match := _UPLOAD.match(path):
                self._upload(match, content)
            elif match := _API.match(path):
                self._api(match[1], match[2], match[3], match[4] or "", json.loads(content))
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
                private = name in hub.private
                self._json({"id": name, "sha": SHA, "siblings": siblings, "private": private, "tags": []})

        def _upload(self, match: re.Match[str], content: bytes) -> None:
            if match["lfs"]:  # without login, as the address is signed
                assert hashlib.sha256(content).hexdigest() == match["lfs"]
                hub.stored[match["lfs"]] = content
                self._send(200, b"")
            elif self.headers.get("Authorization") != "Bearer hf_right":
                self._send(401, b'{"error": "Invalid credentials"}')
            elif match["create"]:
                body = json.loads(content)
                name = f"{body['organization']}/{body['name']}"
                if (hub.root / "models" / name).is_dir():
                    self._send(409, json.dumps({"url": f"{hub.address}/{name}"}).encode())
                    return
                (hub.root / "models" / name).mkdir(parents=True)
                hub.private |= {name} if body.get("visibility") == "private" else set()
                self._json({"url": f"{hub.address}/{name}"})
            elif match["yaml"]:
                languages = yaml.safe_load(json.loads(content)["content"].split("---")[1]).get("language") or []
                wrong = [each for each in languages if not re.fullmatch("[a-z]{2,3}", each)]
                self._send(400 if wrong else 200, json.dumps({"errors": [{"message": str(wrong)}]}).encode())
            elif match["batch"]:
                objects = json.loads(content)["objects"]
                for each in objects:
                    if each["oid"] not in hub.stored:
                        each["actions"] = {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}
                self._json({"transfer": "basic", "objects": objects})
            elif match["what"] == "preupload":
                modes = {True: "lfs", False: "regular"}
                paths = [each["path"] for each in json.loads(content)["files"]]
                self._json({"files": [
                    {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                    for path in paths
                ]})  # fmt: skip
            elif match["what"] == "branch":
                hub.branch(match["name"], match["revision"]).mkdir(parents=True)
                self._json({})
            else:
                self._commit(match["name"], match["revision"], content)

        def _commit(self, name: str, revision: str, content: bytes) -> None:
            """Applies the operations of a commit, one JSON line each."""
            folder = hub.branch(name, revision)
            for operation in map(json.loads, content.splitlines()[1:]):
                value = operation["value"]
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                if operation["key"] == "deletedFile":
                    file.unlink()
                elif operation["key"] == "lfsFile":
                    file.write_bytes(hub.stored[value["oid"]])
                else:
                    file.write_bytes(base64.b64decode(value["content"]))
            self._json({"commitUrl": f"{hub.address}/{name}/commit/{SHA}", "commitOid": SHA})

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
