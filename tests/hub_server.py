"""A local Hugging Face Hub: what `huggingface_hub` requests to upload and download models, with injected faults."""

import base64
import json
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from socket import SHUT_RDWR
from typing import Any

import yaml
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response
from werkzeug.routing import Map, Rule

TOKEN = "hf_" + "aBcD" * 9
ROUTES = Map(
    [
        Rule("/api/repos/create", endpoint="create"),
        Rule("/api/validate-yaml", endpoint="validate_yaml"),
        Rule("/lfs/verify", endpoint="verify_blob"),
        Rule("/lfs/<oid>", endpoint="keep_blob"),
        Rule("/<user>/<name>.git/info/lfs/objects/batch", endpoint="lfs_batch"),
        Rule("/<user>/<name>/resolve/main/<path:path>", endpoint="resolve"),
        Rule("/api/models/<user>/<name>", endpoint="describe"),
        Rule("/api/models/<user>/<name>/revision/main", endpoint="describe"),
        Rule("/api/models/<user>/<name>/preupload/main", endpoint="preupload"),
        Rule("/api/models/<user>/<name>/paths-info/main", endpoint="paths_info"),
        Rule("/api/models/<user>/<name>/commit/main", endpoint="commit"),
    ]
)
"""URL patterns, and the methods of `HubServer` that handle them."""


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    n_commits: int = 0

    @property
    def head(self) -> str:
        return sha1(str(self.n_commits).encode()).hexdigest()


@dataclass
class Fault:
    """Requests of `method` with `part` in their path fail: with `status`, or a dropped connection if it is None."""

    method: str
    part: str
    status: int | None
    after: int = 0  # number of such requests that succeed first


class HubServer(HTTPServer):
    """Use as a context manager. Writing needs TOKEN."""

    def __init__(self) -> None:
        super().__init__(host="127.0.0.1", threaded=True)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    @property
    def url(self) -> str:
        return self.url_for("").rstrip("/")

    def thread_target(self) -> None:
        self.server.serve_forever(poll_interval=0.02)

    def count(self, method: str, part: str = "") -> int:
        return sum(m == method and part in path for m, path in self.requests)

    def application(self, request: Request) -> Response:
        self.requests.append((request.method, request.path))
        fault = next((f for f in self.faults if f.method == request.method and f.part in request.path), None)
        if fault is not None:
            fault.after -= 1
        if fault is not None and fault.after < 0:
            if fault.status is None:
                drop(request)
            request.get_data()
            return answer({"error": "injected"}, fault.status)
        return super().application(request)

    def dispatch(self, request: Request) -> Response:
        needs_token = request.method in ("POST", "PUT") and not request.path.startswith("/lfs/")
        if needs_token and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return answer({"error": "Invalid credentials"}, 401)
        endpoint, values = ROUTES.bind_to_environ(request.environ).match()
        if "user" in values:
            values["repo_id"] = repo_id = f"{values.pop('user')}/{values.pop('name')}"
            if repo_id not in self.repos:
                return answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return getattr(self, endpoint)(request, **values)

    def create(self, request: Request) -> Response:
        repo_id = f"{request.json['organization']}/{request.json['name']}"
        if repo_id in self.repos:
            return answer({"error": "You already created this model repo"}, 409)
        self.repos[repo_id] = Repo(private=request.json.get("visibility") == "private")
        return answer({"url": f"{self.url}/{repo_id}"})

    def validate_yaml(self, request: Request) -> Response:
        try:
            assert isinstance(yaml.safe_load(request.json["content"].split("---\n")[1]), dict)
        except (yaml.YAMLError, IndexError, AssertionError) as error:
            return answer({"errors": [{"message": str(error)}]}, 400)
        return answer({"errors": [], "warnings": []})

    def describe(self, request: Request, repo_id: str) -> Response:
        repo = self.repos[repo_id]
        return answer({"id": repo_id, "sha": repo.head, "private": repo.private, "tags": [], "siblings": []})

    def preupload(self, request: Request, repo_id: str) -> Response:
        files, modes = self.repos[repo_id].files, []
        for path in (file["path"] for file in request.json["files"]):
            oid, mode = etag(path, files.get(path)), "lfs" if is_lfs(path) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": modes})

    def paths_info(self, request: Request, repo_id: str) -> Response:
        files = self.repos[repo_id].files
        return answer([info(path, files[path]) for path in request.form.getlist("paths") if path in files])

    def lfs_batch(self, request: Request, repo_id: str) -> Response:
        objects = []
        for wanted in request.json["objects"]:
            objects.append(dict(wanted))
            if wanted["oid"] not in self.blobs:
                href = f"{self.url}/lfs/{wanted['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.url}/lfs/verify"}}
        return answer({"transfer": "basic", "objects": objects})

    def verify_blob(self, request: Request) -> Response:
        return answer({}, 200 if request.json["oid"] in self.blobs else 404)

    def keep_blob(self, request: Request, oid: str) -> Response:
        if sha256(request.data).hexdigest() != oid:
            return answer({"error": "wrong sha256"}, 400)
        self.blobs[oid] = request.data
        return answer({})

    def commit(self, request: Request, repo_id: str) -> Response:
        repo = self.repos[repo_id]
        files = dict(repo.files)
        for operation in map(json.loads, request.data.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.n_commits += 1
        return answer({"commitUrl": f"{self.url}/{repo_id}/commit/{repo.head}", "commitOid": repo.head})

    def resolve(self, request: Request, repo_id: str, path: str) -> Response:
        repo = self.repos[repo_id]
        if path not in repo.files:
            return answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.head})
        content = repo.files[path]
        return Response(content, headers={"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": repo.head})


def answer(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, content_type="application/json")


def drop(request: Request) -> None:
    """Drop the connection after the first bytes of the body, without a response."""
    request.stream.read(100)
    request.environ["werkzeug.socket"].shutdown(SHUT_RDWR)
    raise ConnectionAbortedError


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    """Git's hash of a file with this content."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes | None) -> str | None:
    return None if content is None else sha256(content).hexdigest() if is_lfs(path) else blob_id(content)


def info(path: str, content: bytes) -> dict[str, Any]:
    described = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_lfs(path):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s" % sha256(content).digest()
        described["lfs"] = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": len(pointer)}
        described["oid"] = blob_id(pointer)
    return described
