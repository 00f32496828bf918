"""A stand-in for the Hugging Face Hub: a small HTTP server with the requests that ``huggingface_hub`` makes for kernels
and models.

It keeps repositories in memory, as commits of files on branches. A test gives it accounts, and hooks that answer a request
before the server does, which is how a test refuses, drops or holds one. Other hooks are called when a request has been
carried out and is not answered yet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support import repo_id

OWNER = repo_id().partition("/")[0]
OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN = "hf_owner", "hf_reader", "hf_stranger"


def account(name: str, role: str, **organizations: str) -> dict[str, Any]:
    orgs = [{"name": name, "roleInOrg": role} for name, role in organizations.items()]
    return {"name": name, "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": role}}}


def blob_id(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Drop(Exception):
    """The connection ends without an answer."""


@dataclass
class Answer(Exception):
    """What is answered instead."""

    status: int
    content: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """Commits by their ids, each with its files, and branches by their names."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    messages: list[str] = field(default_factory=list)
    private: bool = False

    @classmethod
    def new(cls, private: bool = False) -> Repository:
        repository = cls({}, {}, private=private)
        repository.commit("main", {".gitattributes": b"*.bin filter=lfs\n"}, "initial commit")
        return repository

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(f"{branch}: {message}")
        return oid

    def oid(self, revision: str) -> str:
        oid = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return oid

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.oid(revision)]


class Hub:
    """The server's state. ``requests`` are the methods and paths that were asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts = {
            OWNER_TOKEN: account("jo", "write", **{OWNER: "admin"}),
            READER_TOKEN: account("jo", "read", **{OWNER: "admin"}),
            STRANGER_TOKEN: account("stranger", "write"),
        }
        # Organizations whose kernels load without a word of the user.
        self.trusted: set[str] = set()
        self.requests: list[str] = []
        self.hooks: list[Callable[[str], None]] = []
        self.done_hooks: list[Callable[[str], None]] = []
        self.lfs: dict[str, bytes] = {}
        # Paths whose files the Hub wants in its large file storage.
        self.large = re.compile(r"\.bin$")
        self.url = ""

    def refuse_once(self, pattern: str, how: Exception) -> None:
        """Answers the next request that ``pattern`` matches with ``how``."""

        def hook(request: str) -> None:
            if re.search(pattern, request):
                self.hooks.remove(hook)
                raise how

        self.hooks.append(hook)

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, home: str, token: str | None = OWNER_TOKEN) -> dict[str, str]:
        """The variables with which a process finds this server instead of the Hub."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            # Without telemetry kernels 0.17.2 sends a header that huggingface_hub 2 refuses: it ends in a space.
            **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"), "0"),
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    """Turns a request into a call of one of the functions below it; the answer is what they return or raise."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(request)
        try:
            for hook in list(self.hub.hooks):
                hook(request)
            # Matched before it is unquoted: a revision may have a slash, which is quoted.
            answer = self._route(f"{self.command} {url.path}", parse_qs(url.query), body)
            for hook in list(self.hub.done_hooks):
                hook(request)
            self._answer(200, answer, {})
        except Answer as other:
            self._answer(other.status, other.content, other.headers)
        except (Drop, ConnectionError):  # or whoever asked has ended
            self.close_connection = True

    do_GET = do_POST = do_HEAD = do_PUT = _serve

    def _answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _account(self) -> dict[str, Any]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.accounts:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, {"X-Error-Message": message})
        return self.hub.accounts[token]

    def _check_write(self, repo_id: str) -> None:
        who = self._account()
        owners = {who["name"], *(org["name"] for org in who["orgs"])}
        if who["auth"]["accessToken"]["role"] == "read" or repo_id.partition("/")[0] not in owners:
            raise Answer(403, {"error": "You don't have the rights to do this"})

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is not None and repository.private:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            who = self.hub.accounts.get(token, {"name": None, "orgs": []})
            if repo_id.partition("/")[0] not in {who["name"], *(org["name"] for org in who["orgs"])}:
                repository = None
        if repository is None:
            raise Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def _route(self, request: str, query: dict[str, list[str]], body: bytes) -> Any:
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, request):
                groups = (group and unquote(group) for group in match.groups())
                return getattr(self, name)(*groups, query=query, body=body)
        raise Answer(404, {"error": f"the stand-in does not know {request}"})

    def whoami(self, **_: Any) -> Any:
        return self._account()

    def organization(self, name: str, **_: Any) -> Any:
        trusted = {"trustedKernelPublisher": True} if name in self.hub.trusted else {}
        return {"name": name, "fullname": name, "avatarUrl": "", **trusted}

    def validate_yaml(self, body: bytes, **_: Any) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            raise Answer(400, {"errors": [{"message": "there is no header"}], "warnings": []})
        base = (yaml.safe_load(content.split("---\n")[1]) or {}).get("base_model", "org/name")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            raise Answer(400, {"errors": [{"message": message}], "warnings": []})
        return {"errors": [], "warnings": []}

    def create_repository(self, body: bytes, **_: Any) -> Any:
        asked = json.loads(body)
        kind = asked.get("type", "model")
        assert kind in ("kernel", "model")
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{'kernels/' if kind == 'kernel' else ''}{repo_id}"
        self._check_write(repo_id)
        if repo_id in self.hub.repositories:
            raise Answer(409, {"url": url, "error": "exists"})
        # huggingface_hub 1 says private, and 2 says visibility.
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository.new(private)
        return {"url": url}

    def commits(self, repo_id: str, revision: str, **_: Any) -> Any:
        """The newest commit of a branch and the first of all, which is as much as is asked for."""
        repository = self._repository(repo_id)
        listed = dict.fromkeys([repository.oid(revision), next(iter(repository.commits))])
        common = {"title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        return [{"id": oid, **common} for oid in listed]

    def create_branch(self, repo_id: str, branch: str, body: bytes, **_: Any) -> Any:
        repository = self._repository(repo_id)
        self._check_write(repo_id)
        if branch in repository.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.oid(json.loads(body or b"{}").get("startingPoint") or "main")
        return {}

    def refs(self, repo_id: str, **_: Any) -> Any:
        branches = self._repository(repo_id).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return {"branches": listed, "tags": [], "converts": []}

    def information(self, repo_id: str, revision: str | None, **_: Any) -> Any:
        repository = self._repository(repo_id)
        sha = repository.oid(revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return {"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings}

    def tree(self, repo_id: str, revision: str, folder: str | None, query: dict[str, list[str]], **_: Any) -> Any:
        files = self._repository(repo_id).files(revision)
        prefix = f"{folder}/" if folder else ""
        listed: dict[str, Any] = {}
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            first, rest = path.removeprefix(prefix).partition("/")[::2]
            if rest and query.get("recursive") != ["True"] and query.get("recursive") != ["true"]:
                listed[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40}
                continue
            listed[path] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if self.hub.large.search(path):
                oid = hashlib.sha256(content).hexdigest()
                listed[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        if not listed:
            raise Answer(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
        return list(listed.values())

    def preupload(self, repo_id: str, revision: str, body: bytes, **_: Any) -> Any:
        self._check_write(repo_id)
        files = self._repository(repo_id).files(revision)
        answer = []
        for asked in json.loads(body)["files"]:
            path, large = asked["path"], bool(self.hub.large.search(asked["path"]))
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                entry["oid"] = hashlib.sha256(files[path]).hexdigest() if large else blob_id(files[path])
            answer.append(entry)
        return {"files": answer}

    def lfs_batch(self, repo_id: str, body: bytes, **_: Any) -> Any:
        self._check_write(repo_id)
        answer = []
        for asked in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{asked['oid']}", "header": {}}}
            answer.append(entry)
        return {"transfer": "basic", "objects": answer}

    def store(self, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, {"error": "the content has another digest"})
        self.hub.lfs[oid] = body
        return b""

    def commit(self, repo_id: str, revision: str, body: bytes, **_: Any) -> Any:
        self._check_write(repo_id)
        repository = self._repository(repo_id)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.files(revision))
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                del files[value["path"]]
        oid = repository.commit(revision, files, header["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/kernels/{repo_id}/commit/{oid}"}

    def resolve(self, repo_id: str, revision: str, path: str, **_: Any) -> Any:
        repository = self._repository(repo_id)
        oid = repository.oid(revision)
        if path not in repository.commits[oid]:
            raise Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        content = repository.commits[oid][path]
        raise Answer(200, content, {"X-Repo-Commit": oid, "ETag": f'"{blob_id(content)}"'})


REPO = r"([\w.-]+/[\w.-]+)"
KIND = "(?:kernels|models)"
ROUTES = (
    ("GET /api/whoami-v2", "whoami"),
    (r"GET /api/organizations/([\w.-]+)/overview", "organization"),
    ("POST /api/validate-yaml", "validate_yaml"),
    ("POST /api/repos/create", "create_repository"),
    (rf"POST /api/{KIND}/{REPO}/branch/(.+)", "create_branch"),
    (rf"GET /api/{KIND}/{REPO}/refs", "refs"),
    (rf"GET /api/{KIND}/{REPO}/commits/([^/]+)", "commits"),
    (rf"GET /api/{KIND}/{REPO}(?:/revision/(.+))?", "information"),
    (rf"GET /api/{KIND}/{REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    (rf"POST /api/{KIND}/{REPO}/preupload/(.+)", "preupload"),
    (rf"POST /api/{KIND}/{REPO}/commit/(.+)", "commit"),
    (rf"POST (?:/kernels)?/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /storage/(\w+)", "store"),
    (rf"(?:GET|HEAD) (?:/kernels)?/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)
