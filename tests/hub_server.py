"""A Hugging Face Hub on this machine: what `huggingface_hub` asks for to upload and download models, and faults."""

import base64
import json
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "aBcD" * 9


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    n_commits: int = 0

    @property
    def commit(self) -> str:
        return sha1(str(self.n_commits).encode()).hexdigest()


@dataclass
class Fault:
    """Requests of `method` with `part` in their path go wrong: with a status, or None for a dropped connection."""

    method: str
    part: str
    status: int | None
    after: int = 0  # this many such requests go well first


class HubServer(ThreadingHTTPServer):
    """Use as a context manager. Writing needs TOKEN."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def count(self, method: str, part: str = "") -> int:
        return sum(m == method and part in path for m, path in self.requests)

    def handle_error(self, request, client_address):
        """A client that hangs up is nothing to report."""


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    """The name that git gives a file."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait for a delayed acknowledgement
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route()

    def do_HEAD(self):
        self.route()

    def do_POST(self):
        self.route()

    def do_PUT(self):
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        fault = next((f for f in self.server.faults if f.method == self.command and f.part in path), None)
        if fault is not None:
            fault.after -= 1
        if fault is not None and fault.after < 0:
            if fault.status is None:
                self.drop()
                return
            self.body()
            self.answer({"error": "injected"}, fault.status)
            return
        body = self.body()
        needs_token = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate_yaml(json.loads(body)["content"])
        elif path.startswith("/lfs/"):
            self.keep_blob(path.removeprefix("/lfs/"), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch(json.loads(body))
        elif "/resolve/main/" in path:
            self.resolve(*path[1:].split("/resolve/main/"))
        elif path.startswith("/api/models/"):
            user, name, *action = path.removeprefix("/api/models/").split("/")
            self.model_api(f"{user}/{name}", "/".join(action), body)
        else:
            self.answer({"error": "unknown address"}, 404)

    def model_api(self, repo_id: str, action: str, body: bytes) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif action == "" or action == "revision/main":
            self.answer({"id": repo_id, "sha": repo.commit, "private": repo.private, "tags": [], "siblings": []})
        elif action == "preupload/main":
            self.answer({"files": [self.upload_mode(repo, file["path"]) for file in json.loads(body)["files"]]})
        elif action == "paths-info/main":
            asked = parse_qs(body.decode())["paths"]
            self.answer([self.describe(path, repo.files[path]) for path in asked if path in repo.files])
        elif action == "commit/main":
            self.commit(repo_id, repo, [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": "unknown action"}, 404)

    def create(self, asked: dict) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.server.repos:
            self.answer({"error": "You already created this model repo"}, 409)
        else:
            self.server.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
            self.answer({"url": f"{self.server.url}/{repo_id}"})

    def validate_yaml(self, content: str) -> None:
        try:
            assert isinstance(yaml.safe_load(content.split("---\n")[1]), dict)
        except (yaml.YAMLError, IndexError, AssertionError) as error:
            self.answer({"errors": [{"message": str(error)}]}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def upload_mode(self, repo: Repo, path: str) -> dict:
        content = repo.files.get(path)
        oid = None if content is None else sha256(content).hexdigest() if is_lfs(path) else blob_id(content)
        return {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False, "oid": oid}

    def describe(self, path: str, content: bytes) -> dict:
        info = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if is_lfs(path):
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s" % sha256(content).digest()
            info["lfs"] = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": len(pointer)}
            info["oid"] = blob_id(pointer)
        return info

    def lfs_batch(self, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.server.blobs:
                href = f"{self.server.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(answer)
        self.answer({"transfer": "basic", "objects": objects})

    def keep_blob(self, oid: str, body: bytes) -> None:
        if oid == "verify":
            self.answer({}, 200 if json.loads(body)["oid"] in self.server.blobs else 404)
        elif sha256(body).hexdigest() == oid:
            self.server.blobs[oid] = body
            self.answer({})
        else:
            self.answer({"error": "wrong sha256"}, 400)

    def commit(self, repo_id: str, repo: Repo, operations: list[dict]) -> None:
        files = dict(repo.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.n_commits += 1
        self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{repo.commit}", "commitOid": repo.commit})

    def resolve(self, repo_id: str, path: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path not in repo.files:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        else:
            content = repo.files[path]
            etag = sha256(content).hexdigest() if is_lfs(path) else blob_id(content)
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def drop(self) -> None:
        """Hang up after the first bytes of the body, without an answer."""
        if self.command in ("POST", "PUT"):
            self.rfile.read(100)
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
