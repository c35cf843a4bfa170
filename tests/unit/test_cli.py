"""The command line: exit codes, errors, JSON, and what it does not import."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer

from ucm import __version__, cli, machine_memory
from ucm.cli.console import ExitCode, fail, format_bytes, split_settings
from ucm.cli.serve import warn_of_disk, warn_of_memory
from ucm.client import connect
from ucm.config import MemoryConfig, NvmeConfig
from ucm.errors import LEAVES, ConfigError, UcmError
from ucm.sockets import admin_path
from ucm.storage import format as disk_format
from ucm.testing.blocks import chain, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@dataclasses.dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Runner:
    """Runs `ucm ARGUMENTS` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["ucm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)


@pytest.fixture
def ucm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Runner:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
    monkeypatch.setenv("COLUMNS", "200")
    return Runner(monkeypatch, capsys)


def test_help_names_every_command(ucm: Runner) -> None:
    outcome = ucm("--help")
    assert outcome.code == ExitCode.DONE
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in outcome.out
        assert summary in outcome.out


def test_version(ucm: Runner) -> None:
    assert ucm("--version").out.strip() == f"ucm {__version__}"


@pytest.mark.parametrize("name", ["serve", "status", "doctor", "fsck", "config"])
def test_every_command_has_help_and_json(ucm: Runner, name: str) -> None:
    outcome = ucm(name, "--help") if name != "config" else ucm("config", "show", "--help")
    assert outcome.code == ExitCode.DONE
    assert "--json" in outcome.out


@pytest.mark.parametrize(
    "arguments", [("serv",), ("status", "--sockt", "x"), ("config", "shw"), ("serve", "--store")]
)
def test_wrong_use_ends_with_two(ucm: Runner, arguments: tuple[str, ...]) -> None:
    assert ucm(*arguments).code == ExitCode.WRONG_USE
    outcome = ucm(arguments[0], "--json", *arguments[1:])
    assert outcome.code == ExitCode.WRONG_USE
    assert json.loads(outcome.out)["message"] in outcome.err


@pytest.mark.parametrize("timeout", ["-1", "0", "nan", "inf"])
def test_a_timeout_that_is_none_is_wrong_use(ucm: Runner, timeout: str) -> None:
    assert ucm("status", "--timeout", timeout).code == ExitCode.WRONG_USE


def test_status_of_a_daemon_that_hangs(ucm: Runner, folder: Path) -> None:
    path = folder / "hung.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(admin_path(path)))
        listener.listen()
        started_s = time.monotonic()
        outcome = ucm("status", "--socket", path, "--timeout", "0.2", "--json")
        assert time.monotonic() - started_s < 5.0
    assert outcome.code == ExitCode.UNAVAILABLE
    assert "does not answer in time" in json.loads(outcome.out)["message"]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_offers_nothing_that_is_not_ours(ucm: Runner, name: str) -> None:
    assert "completion" not in ucm(name, "--help").out


def test_the_command_line_is_light() -> None:
    """`ucm --help` imports neither torch nor grpc nor lmdb nor numpy."""
    script = (
        "import sys; from ucm import cli\n"
        "sys.argv = ['ucm', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'grpc', 'lmdb', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ucm.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout.strip() == f"ucm {__version__}"


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_line(
    leaf: type[UcmError], as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fail(leaf("first\nsecond"), as_json=as_json)
    out, err = capsys.readouterr()
    assert code in (ExitCode.CHECK_FAILED, ExitCode.WRONG_USE, ExitCode.UNAVAILABLE)
    assert err == "ucm: first second\n"
    assert (json.loads(out)["error"] == leaf.__name__) if as_json else (out == "")


def test_unknown_configuration_is_wrong_use_with_a_hint(ucm: Runner, folder: Path) -> None:
    path = folder / "ucm.toml"
    path.write_text("[memory]\ncapcity_bytes = '1GiB'\n")
    for command in (("serve",), ("status",), ("config", "show"), ("fsck",)):
        outcome = ucm(*command, "--config", path)
        assert outcome.code == ExitCode.WRONG_USE
        assert "did you mean capacity_bytes?" in outcome.err
        assert len(outcome.err.splitlines()) == 1


def test_config_show_prints_values_and_origins(ucm: Runner, folder: Path) -> None:
    outcome = ucm("config", "show", "--set", "memory.capacity_bytes=1GiB", "--origin")
    row = next(line for line in outcome.out.splitlines() if "memory.capacity_bytes" in line)
    assert row.split()[1:] == ["1073741824", "command", "line"]
    values = json.loads(ucm("config", "show", "--json").out)
    assert values["service.socket_path"] == str(folder / "run" / "ucm" / "ucm.sock")
    rows = json.loads(ucm("config", "show", "--json", "--origin").out)
    assert rows["log.level"] == {"value": "INFO", "origin": "default"}


def test_status_without_a_daemon_is_unavailable(ucm: Runner, folder: Path) -> None:
    outcome = ucm("status", "--socket", folder / "none.sock", "--json")
    assert outcome.code == ExitCode.UNAVAILABLE
    assert json.loads(outcome.out)["error"] == "TierUnavailableError"
    assert "ucm serve" in outcome.err


def test_status_of_a_daemon(ucm: Runner, folder: Path) -> None:
    config = small_config(folder)
    path = config.service.socket_path
    with running_daemon(config), connect(path) as cache:
        handle = cache.open_namespace(tiny_spec())
        put(cache, handle, chain(handle.id, 3))
        cache.flush(timeout_s=10)
        found = json.loads(ucm("status", "--socket", path, "--json").out)
        assert (found["pid"], found["state"], found["num_sessions"]) == (os.getpid(), "serving", 1)
        assert found["tiers"][0]["kind"] == "memory"
        assert found["tiers"][1]["num_blocks"] == 3
        assert found["tiers"][1]["io"] in {"posix", "pinned", "kvikio-compat", "gds"}
        assert found["tiers"][1]["io_reason"]
        assert found["namespaces"][0]["id"] == handle.id.hex()
        assert found["namespaces"][0]["model_id"] == tiny_spec().model_id
        assert found["namespaces"][0]["codec"] == "raw"
        assert found["namespaces"][0]["dtype"] == tiny_spec().layout.dtype.value
        text = ucm("status", "--socket", path).out
        assert "serving" in text
        assert "memory" in text
        assert "1 session" in text
        assert "memory held" in text
        assert "held: what a namespace takes" in text
        starts = ("namespace", handle.id.hex()[:8])
        lines = [line.split() for line in text.splitlines()]
        heads, row = (line for line in lines if line and line[0] in starts)
        kv = tiny_spec().layout.dtype.value
        assert row[:6] == [handle.id.hex()[:8], tiny_spec().model_id, kv, "-", "raw", "3"]
        assert heads[:6] == ["namespace", "model", "dtype", "tenant", "codec", "blocks"]
        assert f"nvme through {found['tiers'][1]['io']}: " in text


@pytest.fixture
def store(folder: Path) -> Path:
    """A data folder with three blocks."""
    config = small_config(folder)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        handle = cache.open_namespace(tiny_spec())
        put(cache, handle, chain(handle.id, 3))
        assert cache.flush(timeout_s=10)
    assert config.nvme.path is not None
    return config.nvme.path


def test_fsck_of_a_sound_store(ucm: Runner, store: Path) -> None:
    outcome = ucm("fsck", store, "--json")
    assert outcome.code == ExitCode.DONE
    report = json.loads(outcome.out)
    assert (report["ok"], report["num_blocks"], report["findings"]) == (True, 3, [])
    assert "3 blocks whole" in ucm("fsck", store).out
    assert "3 blocks whole" in ucm("fsck", "--store", store).out
    assert ucm("fsck", store, "--store", store).code == ExitCode.WRONG_USE


def test_fsck_of_a_store_of_another_version_promises_no_repair(
    ucm: Runner, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by = disk_format.FORMAT_VERSION
    monkeypatch.setattr(disk_format, "FORMAT_VERSION", written_by - 1)
    for arguments in ((), ("--repair",)):
        outcome = ucm("fsck", store, *arguments)
        assert outcome.code == ExitCode.CHECK_FAILED
        assert f"has disk format {written_by}" in outcome.out
        assert "neither checked nor changed" in outcome.out
        assert "--repair" not in outcome.out


def test_fsck_finds_and_repairs_a_flipped_bit(ucm: Runner, store: Path) -> None:
    segment = next(iter(sorted(store.rglob("*.seg"))))
    data = bytearray(segment.read_bytes())
    position = next(at for at in range(4096, len(data), 4096) if any(data[at : at + 64]))
    data[position + 8] ^= 1
    segment.write_bytes(data)
    outcome = ucm("fsck", store, "--json")
    assert outcome.code == ExitCode.CHECK_FAILED
    report = json.loads(outcome.out)
    assert not report["ok"]
    assert any(finding["damage"] for finding in report["findings"])
    assert "--repair" in ucm("fsck", store).out
    assert ucm("fsck", store, "--repair").code == ExitCode.DONE
    assert json.loads(ucm("fsck", store, "--json").out)["num_blocks"] < 3


def test_fsck_of_no_store_or_one_in_use_is_wrong_use(ucm: Runner, folder: Path) -> None:
    assert ucm("fsck", folder / "nothing").code == ExitCode.WRONG_USE
    config = small_config(folder)
    with running_daemon(config), connect(config.service.socket_path) as cache:
        cache.open_namespace(tiny_spec())
        outcome = ucm("fsck", config.nvme.path)
        assert outcome.code == ExitCode.WRONG_USE


def test_fsck_without_a_configured_folder(ucm: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCM_NVME_PATH", "none")
    assert "name one" in ucm("fsck").err


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (5 << 40, "5 TiB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_settings_need_a_section_and_a_value() -> None:
    expected: Mapping[str, str] = {"a.b": "c=d"}
    assert split_settings(["a.b=c=d"]) == expected
    for bad in ("a.b", "ab=c"):
        with pytest.raises(ConfigError, match=r"section\.field=value"):
            split_settings([bad])


def test_the_table_of_commands_is_sound() -> None:
    """Modules that exist expose a typer app named `command`."""
    for name in ("serve", "status", "doctor", "fsck", "config"):
        module = __import__(cli.COMMANDS[name][0], fromlist=["command"])
        assert isinstance(module.command, typer.Typer)


def test_options_of_doctor_stand_behind_the_command(ucm: Runner) -> None:
    result = ucm("doctor", "--json", "kernels")
    assert result.code == 2
    assert "ucm doctor kernels --json" in result.out + result.err


def test_more_memory_than_the_machine_has_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_memory(MemoryConfig(capacity_bytes=1 << 20))
    assert not caplog.records
    warn_of_memory(MemoryConfig(capacity_bytes=1 << 50))
    assert "memory.capacity_bytes is 1024 TiB, the machine has " in caplog.text


def test_a_store_larger_than_its_disk_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for nvme in (
        NvmeConfig(path=tmp_path, capacity_bytes=1 << 20),
        NvmeConfig(path=tmp_path / "gone", capacity_bytes=1 << 60),
        NvmeConfig(path=None, capacity_bytes=1 << 60),
    ):
        warn_of_disk(nvme)
    assert not caplog.records
    warn_of_disk(NvmeConfig(path=tmp_path, capacity_bytes=1 << 60))
    assert f"the file system of {tmp_path} has " in caplog.text


def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    limit.write_text("max\n")
    warn_of_memory(MemoryConfig(capacity_bytes=1 << 30))
    assert not caplog.records
    limit.write_text(f"{1 << 20}\n")
    warn_of_memory(MemoryConfig(capacity_bytes=1 << 30))
    assert "memory.capacity_bytes is 1 GiB, the machine has 1 MiB" in caplog.text
