"""The HTTP side of LocalHub: the requests that huggingface_hub and Diffusers make of a Hub, answered from its repositories."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import urllib.parse
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from .hub import LocalHub, Repository

DATE = "2026-01-01T00:00:00.000Z"  # commits are told apart by their hashes, and equal ones are to be equal
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?")  # id, what, revision (quoted), rest
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LARGE = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.png", "*.gif")  # uploaded on their own, before the commit
UPLOAD = re.compile(r"/lfs/([0-9a-f]{64})")


@dataclass(frozen=True)
class Request:
    """One request that the Hub has answered."""

    method: str
    path: str  # with its query
    status: int  # 0 where the connection was cut
    authorized: bool  # it came with the token


class Refused(Exception):
    """An answer other than success: HTTP status, the Hub's code for it, and what a person reads."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(message)


class Server(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface; one thread per connection."""

    daemon_threads = True

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember a connection: clients keep them for later requests."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening, and hang up."""
        super().server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that end take their connections with them."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet; ``hub.requests`` has them."""

    def answer(self) -> None:
        """Read a request whole, answer it, and write it down."""
        hub, parts = self.server.hub, urllib.parse.urlsplit(self.path)
        self.query, self.authorized = dict(urllib.parse.parse_qsl(parts.query)), False
        if UPLOAD.fullmatch(parts.path) or "/commit/" in parts.path:
            fate = hub.upload_fate()
            if fate == "cut":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return self._note(0)
        else:
            fate = "accept"
        self.data = self._body()
        try:
            told = self.headers.get("Authorization")
            if told not in (None, f"Bearer {hub.token}"):
                raise Refused(401, "Invalid credentials in Authorization header")
            self.authorized = told is not None
            if fate == "refuse":
                raise Refused(507, "no more uploads are taken until LocalHub.repair()")
            with hub.lock:
                self._route(parts.path)
        except Refused as refusal:
            # The code where one is known: clients choose their exception by it.
            named = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._json({"error": refusal.message}, refusal.status, **named, **{"X-Error-Message": refusal.message})
        except (KeyError, TypeError, ValueError) as error:  # a body that is not what this request has
            self._json({"error": str(error)}, 400, **{"X-Error-Message": ascii(str(error))})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, path: str) -> None:
        if found := API.fullmatch(path):
            repo_id, what, revision, rest = (urllib.parse.unquote(part) if part else "" for part in found.groups())
            return self._api(repo_id, what, revision or "main", rest)
        if found := RESOLVE.fullmatch(path):
            return self._resolve(*map(urllib.parse.unquote, found.groups()))
        if found := BATCH.fullmatch(path):
            return self._batch(found[1])
        if found := UPLOAD.fullmatch(path):
            return self._upload(found[1])
        if path == "/api/whoami-v2":
            self._need_token()
            return self._json({"type": "user", "name": self.server.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self._validate_card()
        if path in ("/api/repos/create", "/api/repos/delete"):
            return self._create_or_delete(path.rsplit("/", 1)[1])
        raise Refused(404, f"LocalHub does not answer {self.command} {path}")

    # --- who may what -----------------------------------------------------------------------------------------------

    def _need_token(self) -> None:
        if not self.authorized:
            raise Refused(401, "Invalid username or password.")

    def _readable(self, repo_id: str) -> Repository:
        repository = self.server.hub.repository(repo_id)
        owns = self.authorized and repo_id.startswith(f"{self.server.hub.user}/")
        if repository is None or (repository.private and not owns):  # a stranger is not told which of the two it is
            raise Refused(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        self._need_own(repo_id)
        return repository

    def _need_own(self, repo_id: str) -> None:
        self._need_token()
        if not repo_id.startswith(f"{self.server.hub.user}/"):
            raise Refused(403, f"this token may not write to {repo_id}")

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> tuple[str, dict[str, str]]:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]["files"]

    # --- reading ----------------------------------------------------------------------------------------------------

    def _api(self, repo_id: str, what: str, revision: str, rest: str) -> None:
        if self.command != "GET" and what != "paths-info":
            return self._change(repo_id, what, revision)
        repository = self._readable(repo_id)
        if what == "refs":
            marks = {
                kind: [
                    {"name": k, "ref": f"refs/{'heads' if kind == 'branches' else 'tags'}/{k}", "targetCommit": v} for k, v in own.items()
                ]
                for kind, own in (("branches", repository.branches), ("tags", repository.tags))
            }
            return self._json({**marks, "converts": [], "pullRequests": []})
        sha, files = self._commit_of(repository, revision)
        if what in ("", "revision"):
            own = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "tags": [], "downloads": 0, "likes": 0}
            return self._json({**own, "siblings": [{"rfilename": path} for path in sorted(files)]})
        if what == "commits":
            line: list[dict[str, Any]] = []
            at: str | None = sha
            while at is not None:
                commit = repository.commits[at]
                line.append(
                    {"id": at, "title": commit["message"], "message": "", "authors": [{"user": self.server.hub.user}], "date": DATE}
                )
                at = commit["parent"]
            return self._json(line)
        if what == "tree":
            return self._json(self._tree(files, rest, recursive=self.query.get("recursive", "").lower() in ("1", "true")))
        if what == "paths-info":
            form = json.loads(self.data) if self.data[:1] == b"{" else urllib.parse.parse_qs(self.data.decode())
            return self._json([self._entry(path, files[path]) for path in form.get("paths", []) if path in files])
        raise Refused(404, f"LocalHub does not answer {self.command} .../{what}")

    def _tree(self, files: dict[str, str], under: str, recursive: bool) -> list[dict[str, Any]]:
        inside = {path: content for path, content in files.items() if not under or path.startswith(f"{under.rstrip('/')}/")}
        if under and not inside:
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        depth = len(PurePosixPath(under).parts)
        folders = {"/".join(PurePosixPath(path).parts[:n]) for path in inside for n in range(depth + 1, len(PurePosixPath(path).parts))}
        entries = [self._entry(path, content) for path, content in sorted(inside.items())]
        entries += [
            {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in sorted(folders)
        ]
        return [entry for entry in entries if recursive or len(PurePosixPath(entry["path"]).parts) == depth + 1]

    def _entry(self, path: str, content: str) -> dict[str, Any]:
        size = self.server.hub.object(content).stat().st_size
        large = {"lfs": {"oid": content, "size": size, "pointerSize": 134}} if _is_large(path, size) else {}
        return {"type": "file", "path": path, "size": size, "oid": self._oid(content), **large}

    def _oid(self, content: str) -> str:
        data = self.server.hub.object(content).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._commit_of(self._readable(repo_id), revision)
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        data = self.server.hub.object(files[path]).read_bytes()
        large = _is_large(path, len(data))
        linked = {"X-Linked-Etag": f'"{files[path]}"', "X-Linked-Size": str(len(data))} if large else {}
        headers = {
            "ETag": f'"{files[path] if large else self._oid(files[path])}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
            **linked,
        }
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if first and 0 < int(first[1]) < len(data):
            headers["Content-Range"] = f"bytes {first[1]}-{len(data) - 1}/{len(data)}"
            return self._send(data[int(first[1]) :], 206, "application/octet-stream", headers)
        self._send(data, 200, "application/octet-stream", headers)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _change(self, repo_id: str, what: str, revision: str) -> None:
        hub, repository = self.server.hub, self._writable(repo_id)
        body = json.loads(self.data) if self.data and what != "commit" else {}
        if what == "preupload":
            _, files = self._commit_of(repository, revision)
            told = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": self._known(file["path"], files),
                }
                for file in body["files"]
            ]
            return self._json({"files": told})
        if what == "commit":
            return self._commit(repo_id, repository, revision)
        if what in ("branch", "tag"):
            kind = "branches" if what == "branch" else "tags"
            if self.command == "DELETE":
                hub.point(repo_id, kind, revision, None)
                return self._json({})
            # A branch is named in the address and starts somewhere; of a tag the address names the commit.
            name, start = (revision, body.get("startingPoint", "main")) if what == "branch" else (body["tag"], revision)
            if name in (repository.branches if what == "branch" else repository.tags):
                raise Refused(409, f"{what} {name} exists already")
            hub.point(repo_id, kind, name, self._commit_of(repository, start)[0])
            return self._json({})
        if what == "settings":
            hub.set_private(repo_id, body.get("visibility") == "private" if "visibility" in body else bool(body.get("private")))
            return self._json({})
        raise Refused(404, f"LocalHub does not answer {self.command} .../{what}")

    def _known(self, path: str, files: dict[str, str]) -> str | None:
        """How clients recognise that what they have is there already."""
        if path not in files:
            return None
        large = _is_large(path, self.server.hub.object(files[path]).stat().st_size)
        return files[path] if large else self._oid(files[path])

    def _commit(self, repo_id: str, repository: Repository, revision: str) -> None:
        hub = self.server.hub
        parent, files = self._commit_of(repository, revision)
        contents: dict[str, str | None] = {}
        message = ""
        for line in self.data.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                contents[value["path"]] = hub.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not re.fullmatch(r"[0-9a-f]{64}", value["oid"]) or not hub.object(value["oid"]).is_file():
                    raise Refused(400, f"the content of {value['path']} was not uploaded")
                contents[value["path"]] = value["oid"]
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path for path in files if path == value["path"] or (key == "deletedFolder" and path.startswith(value["path"]))]
                if not gone:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                contents |= dict.fromkeys(gone)
        sha = hub.record(repo_id, contents, branch=revision, message=message)
        self._json({"commitUrl": f"{hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def _batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        hub = self.server.hub
        objects = []
        for wanted in json.loads(self.data)["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}}
            is_there = hub.object(wanted["oid"]).is_file()
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if is_there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _upload(self, content: str) -> None:
        # As on the real Hub the address is the permission, and only a batch tells it.
        if self.command != "PUT" or hashlib.sha256(self.data).hexdigest() != content:
            raise Refused(400, "the content does not have its hash")
        self.server.hub.keep(self.data)
        self._json({})

    def _create_or_delete(self, what: str) -> None:
        hub, body = self.server.hub, json.loads(self.data)
        if (body.get("type") or "model") != "model":
            raise Refused(400, "LocalHub has models only")
        repo_id = f"{body.get('organization') or hub.user}/{body['name']}"
        self._need_own(repo_id)
        there = hub.repository(repo_id) is not None
        if what == "delete":
            self._readable(repo_id)
            hub.delete(repo_id)
            return self._json({})
        if there:
            return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}, 409)
        hub.create(repo_id, private=bool(body.get("private")) or body.get("visibility") == "private")
        self._json({"url": f"{hub.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def _validate_card(self) -> None:
        content = json.loads(self.data)["content"]
        header = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            told = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if not isinstance(told, dict):
            return self._json({"errors": [{"message": "the metadata are no mapping"}], "warnings": []}, 400)
        self._json({"errors": [], "warnings": [] if told else [{"message": "empty or missing yaml metadata in repo card"}]})

    # --- answers ----------------------------------------------------------------------------------------------------

    def _json(self, content: Any, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, kind, headers)

    def _send(self, data: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self._note(status)  # before the answer: who has it finds the request written down
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _note(self, status: int) -> None:
        self.server.hub.requests.append(Request(self.command, self.path, status, self.authorized))


def _is_large(path: str, size: int) -> bool:
    return size > 10 * 2**20 or (size > 0 and any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LARGE))
