"""A hub on this machine: the part of its interface that huggingface_hub uses to fetch and to push models.

What it holds is in memory: ``hub.commits[name]`` is a list of {file: bytes}, the last one being ``main``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


class Hub:
    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.private: set[str] = set()
        self.writers = {"secret"}  # tokens that may push
        self.address = ""

    def add(self, name: str, folder: Path, **changed: bytes) -> None:
        """A commit of all files of `folder`, of which some have other bytes (dots written as _)."""
        contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for file in contents:
            contents[file] = changed.get(file.replace(".", "_"), contents[file])
        self.commits.setdefault(name, []).append(contents)

    def commit(self, name: str, number: int = -1) -> str:
        """The id of a commit, of 40 hexadecimal digits as git's."""
        number = range(len(self.commits[name]))[number]
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def contents(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for number, contents in reversed(list(enumerate(self.commits[name]))):
            commit = self.commit(name, number)
            if revision in (commit, "main"):
                return commit, contents
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.reply(404, {"error": code}, {"X-Error-Code": code})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.hub.commits:
            return self.missing("RepoNotFound")
        if not rest:
            rest = ["revision", "main"]
        found = self.hub.contents(name, rest[1])
        if found is None:
            return self.missing("RevisionNotFound")
        commit, contents = found
        if rest[0] == "resolve":
            if rest[2] not in contents:
                return self.missing("EntryNotFound")
            data = contents[rest[2]]
            etag = hashlib.sha256(data).hexdigest()
            return self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        if rest[0] == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in contents.items()
            ]
            return self.reply(200, entries)
        siblings = [{"rfilename": file, "size": len(data)} for file, data in contents.items()]
        self.reply(200, {"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.writers:
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            status = 409 if name in self.hub.commits else 200
            self.hub.commits.setdefault(name, [{".gitattributes": b""}])
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self.reply(status, {"url": f"{self.hub.address}/{name}"})
        parts = path.removeprefix("api/models/").split("/")
        name, action = "/".join(parts[:2]), parts[2]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        contents = dict(self.hub.commits[name][-1])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del contents[value["path"]]
        self.hub.commits[name].append(contents)
        commit = self.hub.commit(name)
        address = f"{self.hub.address}/{name}/commit/{commit}"
        self.reply(200, {"commitUrl": address, "commitOid": commit, "pullRequestUrl": None})


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine, which huggingface_hub takes for the real one meanwhile.

    Another process finds it by its ``address`` in HF_ENDPOINT.
    """
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        resolve = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        try:
            with (
                mock.patch.object(constants, "ENDPOINT", hub.address),
                mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve),
            ):
                yield hub
        finally:
            server.shutdown()
