"""A stand-in of the hub on the loopback interface, for the real clients: repositories in memory, faults on demand.

Two ports, as two origins: the hub itself, and a store of large files to which it redirects. What the clients of our lock ask
for is answered in the hub's own forms: repository facts, listings, small files, redirects with sizes and hashes, gates.
"""

import contextlib
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gz", ".gguf")
LISTED = 1000  # entries on one page of a listing
REVISION = r"(?P<revision>refs%2F[^/]+|[^/]+)"
ID = r"(?P<name>[^/]+/[^/]+?)"


@dataclass(frozen=True)
class File:
    """One file of a commit, with the two names that its content has: git's, and the SHA-256 of a large one."""

    path: str
    content: bytes

    @property
    def large(self):
        return self.path.endswith(LARGE)

    @functools.cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def blob(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def entry(self):
        facts = {"type": "file", "path": self.path, "size": len(self.content), "oid": self.blob}
        return facts | ({"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.large else {})


@dataclass
class Repository:
    gated: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    first: object = None  # makes the files of the first commit, when they are asked for

    def files(self, revision):
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What happens to requests whose `METHOD origin path` matches: a status, or a body that ends or stands still at `cut`."""

    pattern: str
    times: float
    status: int = 0
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    silent: float = 0
    flip: bool = False


class Hub:
    """`tokens`: token -> names of the gated repositories that it may read; `requests`: what was asked, `METHOD origin path`."""

    def __init__(self):
        self.repositories, self.tokens, self.faults, self.requests = {}, {}, [], []
        self.lock, self.making = threading.Lock(), threading.Lock()
        self.blobs = {}
        self.ports = {"hub": 0, "store": 0}
        self.servers = []

    # --- what tests say -------------------------------------------------------------------------------------------------
    def commit(self, kind, name, files, branch="main", gated=False):
        """Put a commit with these files (path -> bytes) on a branch and return its hash."""
        made = {path: File(path, content) for path, content in sorted(files.items())}
        digest = hashlib.sha1(repr([(name, path, file.blob) for path, file in made.items()]).encode()).hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.gated = gated
        repository.commits[digest] = made
        repository.branches[branch] = digest
        self.blobs |= {file.sha256: file for file in made.values() if file.large}
        return digest

    def promise(self, kind, name, make, gated=False):
        """Let `make` give the files of a repository's first commit when it is asked for."""
        self.repositories[kind, name] = Repository(gated, first=make)

    def repository(self, kind, name):
        with self.making:
            found = self.repositories.get((kind, name))
            if found and found.first:
                make, found.first = found.first, None
                self.commit(kind, name, make(), gated=found.gated)
        return found

    def fail(self, pattern, times=1, **what):
        self.faults.append(Fault(pattern, times, **what))

    def asked(self, pattern):
        return [line for line in self.requests if re.search(pattern, line)]

    def heal(self):
        self.faults.clear()
        self.requests.clear()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.ports['hub']}"

    def start(self):
        """Listen, on the same ports as before if it listened already."""
        for origin, port in self.ports.items():
            server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"hub": self, "origin": origin}))
            self.ports[origin] = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self.servers.append(server)
        return self

    def stop(self):
        while self.servers:
            server = self.servers.pop()
            server.shutdown()
            server.server_close()

    # --- what handlers ask ----------------------------------------------------------------------------------------------
    def fault(self, line):
        with self.lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return Fault("", 0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address):
        """Clients that hang up in the middle are part of the tests."""


class _Refused(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.fault = self.hub.fault(f"{self.command} {self.origin} {unquote(self.path)}")
        if self.fault.silent:
            time.sleep(self.fault.silent)
        if self.fault.status:
            self._send(self.fault.status, b"out of order", self.fault.headers)
            return
        try:
            if self.origin == "store":
                if "Authorization" in self.headers:
                    raise _Refused(400, "", "a token was sent to the store")
                self._send_file(self._stored(address.path), {})
            else:
                self._route(address.path, parse_qs(address.query), body)
        except _Refused as refused:
            named = {"X-Error-Code": refused.code} if refused.code else {}
            self._send_json({"error": refused.message}, {"X-Error-Message": refused.message, **named}, refused.status)

    do_GET = do_HEAD = do_POST = _answer

    def _send(self, status, body, headers, length=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.flip:
            body = bytes(byte ^ 0xFF for byte in body)
        if self.fault.cut is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: self.fault.cut])
        self.wfile.flush()
        time.sleep(0.05)
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        self.close_connection = True

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def _send_json(self, value, headers=(), status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **dict(headers)})

    def _send_file(self, file, headers):
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{file.sha256 if file.large else file.blob}"', **headers}
        size = len(file.content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            if start >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            part = {"Content-Range": f"bytes {start}-{end}/{size}", **headers}
            self._send(206, file.content[start : end + 1], part)
            return
        self._send(200, file.content, headers)

    def _stored(self, path):
        if (file := self.hub.blobs.get(path.rpartition("/")[2])) is None:
            raise _Refused(403, "", "no such object")
        return file

    # --- the hub's addresses --------------------------------------------------------------------------------------------
    def _route(self, path, query, body):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        for pattern, answer in (
            (rf"/(?P<kind>dataset)s/{ID}/resolve/{REVISION}/(?P<file>.+)", self._resolve),
            (rf"/{ID}/resolve/{REVISION}/(?P<file>.+)", self._resolve),
            (r"/api/(?P<kind>model|dataset)s", self._search),
            (rf"/api/(?P<kind>model|dataset)s/{ID}/tree/{REVISION}(?:/(?P<below>.+))?", self._tree),
            (rf"/api/(?P<kind>model|dataset)s/{ID}/paths-info/{REVISION}", self._paths),
            (rf"/api/(?P<kind>model|dataset)s/{ID}/auth-check", self._check_access),
            (rf"/api/(?P<kind>model|dataset)s/{ID}(?:/revision/{REVISION})?", self._facts),
        ):
            if found := re.fullmatch(pattern, path):
                given = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                answer(token=token, query=query, body=body, **given)
                return
        raise _Refused(404, "", "Sorry, we can't find the page you are looking for.")

    def _repository(self, kind, name, token, content=False):
        repository = self.hub.repository(kind, name)
        if repository is None:  # the hub hides from strangers whether it exists
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and name not in self.hub.tokens.get(token, ()):
            raise _Refused(403 if token else 401, "GatedRepo", f"Access to {kind} {name} is restricted.")
        return repository

    def _commit(self, repository, revision):
        files = repository.files(revision)
        if files is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.branches.get(revision, revision), files

    def _resolve(self, name, revision, file, token, kind="model", **_):
        commit, files = self._commit(self._repository(kind, name, token, content=True), revision)
        if file not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        found, headers = files[file], {"X-Repo-Commit": commit}
        if not found.large:
            self._send_file(found, headers)
            return
        address = f"http://127.0.0.1:{self.hub.ports['store']}/{quote(name)}/{found.sha256}"
        linked = {"X-Linked-Size": len(found.content), "X-Linked-ETag": f'"{found.sha256}"', "Location": address}
        self._send(302, b"", headers | linked)

    def _facts(self, kind, name, token, revision="main", **_):
        repository = self._repository(kind, name, token)
        commit, files = self._commit(repository, revision)
        siblings = [{"rfilename": path} for path in files]
        gated = "auto" if repository.gated else False
        self._send_json({"id": name, "sha": commit, "private": False, "gated": gated, "tags": [], "siblings": siblings})

    def _check_access(self, kind, name, token, **_):
        self._repository(kind, name, token, content=True)
        self._send_json({})

    def _search(self, kind, query, **_):
        wanted = query.get("search", [""])[0].lower()
        self._send_json([{"id": name} for one, name in self.hub.repositories if one == kind and wanted in name.lower()])

    def _tree(self, kind, name, token, query, revision, below="", **_):
        commit, files = self._commit(self._repository(kind, name, token), revision)
        entries = _below(files, f"{below}/" if below else "", query.get("recursive", [""])[0].lower() in ("true", "1"))
        if below and not entries:
            raise _Refused(404, "EntryNotFound", f"{below} does not exist")
        start = int(query.get("cursor", ["0"])[0])
        page = {}
        if start + LISTED < len(entries):
            kept = "&".join(f"{key}={values[0]}" for key, values in query.items() if key != "cursor")
            here = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            page = {"Link": f'<{here}?{kept}&cursor={start + LISTED}>; rel="next"'}
        self._send_json(entries[start : start + LISTED], {"X-Repo-Commit": commit, **page})

    def _paths(self, kind, name, token, body, revision, **_):
        _, files = self._commit(self._repository(kind, name, token), revision)
        form = self.headers.get("Content-Type", "")
        asked = json.loads(body) if "json" in form else parse_qs(body.decode())
        folders = {folder["path"]: folder for folder in _below(files, "", True) if folder["type"] == "directory"}
        known = {path: file.entry for path, file in files.items()} | folders
        self._send_json([known[path] for path in asked.get("paths", []) if path in known])


def _below(files, prefix, recursive):
    """The entries of a folder as a listing tells them, folders before what is in them."""
    entries = {}
    for path, file in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            entries.setdefault(
                folder, {"type": "directory", "path": folder, "size": 0, "oid": hashlib.sha1(folder.encode()).hexdigest()}
            )
        if recursive or len(parts) == 1:
            entries[path] = file.entry
    return list(entries.values())
