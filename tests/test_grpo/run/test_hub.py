"""Uploads to a small stand-in for the hub's API on 127.0.0.1, through the hub's own client library."""

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from grpo.config import ConfigError
from grpo.run.hub import check_push, push


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory; `refusal` (status, message) answers every call."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeApi)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict] = {}  # id -> {"private": bool, "files": {path: bytes}}
        self.tokens: set[str] = set()
        self.refusal: tuple[int, str] | None = None


class FakeApi(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content: dict, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802
        self.handle_call(b"")

    def do_POST(self):  # noqa: N802
        size = self.headers["Content-Length"]
        if size is not None:
            return self.handle_call(self.rfile.read(int(size)))
        chunks = []  # sent in chunks
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        self.handle_call(b"".join(chunks))

    def handle_call(self, body: bytes) -> None:
        hub, parts = self.server, self.path.partition("?")[0].strip("/").split("/")
        if parts[1:2] in (["repos"], ["models"]):
            hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.refusal is not None:
            status, message = hub.refusal
            return self.answer({"error": message}, status, **{"X-Error-Message": message})
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_there = name in hub.repositories
            hub.repositories.setdefault(name, {"private": asked.get("private") or asked.get("visibility") == "private",
                                               "files": {}})
            return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name}, 409 if is_there else 200)
        if parts[1:2] == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if (repository := hub.repositories.get(name)) is None:
            return self.answer({"error": "Not found"}, 404)
        if parts[4:5] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        if parts[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1", "hookOutput": ""})
        self.answer({"id": name, "private": repository["private"], "siblings": [], "tags": []})


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    (out / "expert_adapter").mkdir(parents=True)
    (out / "README.md").write_text("---\nlibrary_name: peft\n---\n# a\n")
    (out / "adapter_config.json").write_text("{}")
    (out / "expert_adapter/adapter_config.json").write_text('{"r": 2}')
    return out


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_into_a_repository_that_is_made(hub, folder, private):
    address = push(folder, "team/tuned", private=private)
    assert address == f"{hub.url}/team/tuned"
    assert hub.repositories == {"team/tuned": {"private": private, "files": files_of(folder)}}
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_repository_that_exists_gets_the_files(hub, folder):
    hub.repositories["team/tuned"] = {"private": False, "files": {"other": b"kept"}}
    push(folder, "team/tuned", private=False)
    assert hub.repositories["team/tuned"]["files"] == {"other": b"kept", **files_of(folder)}


def test_a_private_export_never_goes_into_a_public_repository(hub, folder):
    hub.repositories["team/tuned"] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="exists and is public; nothing was uploaded"):
        push(folder, "team/tuned", private=True)
    assert hub.repositories["team/tuned"]["files"] == {}


@pytest.mark.parametrize("status, answer, advice", [
    (401, "Invalid username or password.", "the token is not valid: log in with `hf auth login`, or set HF_TOKEN"),
    (403, "You don't have the rights to create a model under the namespace team", "the role 'write'.* publish for team"),
    (404, "Not found", "no user or organisation team that this token can see"),
    (400, "Invalid metadata in README.md", "Invalid metadata in README.md"),
])  # fmt: skip
def test_what_the_hub_refuses_is_said_with_what_to_do_and_the_folder_stays(hub, folder, status, answer, advice):
    before = files_of(folder)
    hub.refusal = (status, answer)
    with pytest.raises(ConfigError, match=f"(?s)--push team/tuned: the hub answered {status}.*{advice}") as caught:
        push(folder, "team/tuned", private=False)
    assert f"The export is complete in {folder}; upload it later with: hf upload team/tuned {folder}" in str(caught.value)
    assert files_of(folder) == before


def test_a_hub_that_cannot_be_reached_is_said_and_the_folder_stays(hub, folder, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ConfigError, match="the hub could not be reached .*upload it later with: hf upload team/tuned"):
            push(folder, "team/tuned", private=False)
    assert (folder / "README.md").exists()


def test_offline_mode_is_said(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="could not be reached .*offline"):
        push(folder, "team/tuned", private=False)


def test_a_bad_name_and_a_missing_token_are_found_before_anything_is_written(monkeypatch, tmp_path):
    for name in ("tuned", "a/b/c", "/tuned", "team/", "team/../x"):
        with pytest.raises(ConfigError, match="expected ORGANISATION/NAME"):
            check_push(name)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="there is no token: log in with `hf auth login`, or set HF_TOKEN"):
        check_push("team/tuned")
