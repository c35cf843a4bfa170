"""Configuration: precedence, units, hints, origins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ucm import config
from ucm.config import GIB, MIB, QuotaConfig
from ucm.config_loader import (
    FIELD_TYPES,
    default_socket_path,
    default_store_path,
    env_name,
    load_config,
)
from ucm.config_values import check_value, parse_size, parse_value
from ucm.errors import ConfigError
from ucm.storage import codecs


def write(folder: Path, text: str) -> Path:
    path = folder / "ucm.toml"
    path.write_text(text)
    return path


def test_without_any_source_everything_is_a_default(tmp_path: Path) -> None:
    loaded = load_config(environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert set(loaded.origins) == set(FIELD_TYPES)
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.config.nvme.path == default_store_path()


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[service]\nmax_sessions = 1\nmax_namespaces = 1\nrpc_threads = 1\n",
    )
    environ = {"UCM_SERVICE_MAX_NAMESPACES": "2", "UCM_SERVICE_RPC_THREADS": "2"}
    loaded = load_config(path, environ=environ, overrides={"service.rpc_threads": "3"})
    service = loaded.config.service
    assert (service.max_sessions, service.max_namespaces, service.rpc_threads) == (1, 2, 3)
    assert loaded.origins["service.max_sessions"] == f"file {path}"
    assert loaded.origins["service.max_namespaces"] == "environment UCM_SERVICE_MAX_NAMESPACES"
    assert loaded.origins["service.rpc_threads"] == "command line"
    assert loaded.origins["service.staging_bytes"] == "default"


def test_every_type_can_be_given_in_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [service]
        socket_path = "run/ucm.sock"
        allowed_uids = [1000, 1001]
        staging_bytes = "64MiB"
        drain_timeout_s = 3
        [memory]
        capacity_bytes = 1048576
        low_watermark = 0.5
        [nvme]
        path = "none"
        [log]
        level = "DEBUG"
        """,
    )
    config = load_config(path, environ={}).config
    assert config.service.socket_path == tmp_path / "run/ucm.sock"
    assert config.service.allowed_uids == (1000, 1001)
    assert config.service.staging_bytes == 64 * MIB
    assert config.service.drain_timeout_s == 3.0
    assert config.memory.capacity_bytes == MIB
    assert config.nvme.path is None
    assert config.log.level == "DEBUG"


@pytest.mark.parametrize("name", FIELD_TYPES)
def test_every_field_can_be_given_as_text(name: str, tmp_path: Path) -> None:
    """What `config show` prints is what the environment takes."""
    empty = {"XDG_CONFIG_HOME": str(tmp_path)}
    section, field = name.split(".")
    default = getattr(getattr(load_config(environ=empty).config, section), field)
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    loaded = load_config(environ={**empty, env_name(name): text})
    assert getattr(getattr(loaded.config, section), field) == default
    assert loaded.origins[name] == f"environment {env_name(name)}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4GiB", 4 * GIB),
        ("4 gib", 4 * GIB),
        ("1.5MiB", 3 * MIB // 2),
        ("2k", 2048),
        ("2kB", 2000),
        ("1T", 1 << 40),
        ("3 MB", 3_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_every_setting_of_bytes_is_a_size() -> None:
    names = [name for name in FIELD_TYPES if "bytes" in name]
    assert "service.inflight_bytes_per_session" in names
    for name in names:
        found = parse_value(name, "3MiB", FIELD_TYPES[name], origin="test", base=Path())
        assert found == 3 * MIB, name


@pytest.mark.parametrize("text", ["", "GiB", "4 XiB", "-1", "4GiB4", "0x10", "1e9", "٣x"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sevice]\nmax_sessions = 1\n", r"unknown section \[sevice\]; did you mean service\?"),
        ("[memory]\ncapacity = 1\n", r"\[memory\]; did you mean capacity_bytes\?$"),
        ("capacity_bytes = 1\n", r"before any section; write it below \[memory\], \[nvme\]"),
        ("[memory]\ncapacity_bytes = 1GiB\n", r'into quotes: capacity_bytes = "1GiB"$'),
        ("[nvme]\nio_thread = 1\n", r"unknown key 'io_thread' .* did you mean io_threads\?"),
        ("service = 1\n", r"service must be a section"),
        ("[service\n", r"is not valid TOML"),
        ("[service]\nmax_sessions = 'x'\n", r"max_sessions is 'x', expected a whole number"),
        ("[service]\nmax_sessions = true\n", r"expected a whole number"),
        ("[service]\nmax_sessions = 1.5\n", r"expected a whole number"),
        ("[service]\nmax_sessions = 0\n", r"expected more than 0"),
        ("[service]\nstaging_bytes = '4 apples'\n", r"expected a size such as 4GiB"),
        ("[service]\ndrain_timeout_s = 'soon'\n", r"expected a number of seconds"),
        ("[service]\ndrain_timeout_s = nan\n", r"expected more than 0"),
        ("[service]\nallowed_uids = 'me'\n", r"expected a list of whole numbers"),
        ("[service]\nallowed_uids = 5\n", r"expected a list of whole numbers"),
        ("[service]\nallowed_uids = [-1]\n", r"expected user ids"),
        ("[service]\nmax_message_bytes = '2GiB'\n", r"less than 2GiB"),
        ("[service]\nsocket_path = ''\n", r"expected a path"),
        ("[nvme]\npath = 3\n", r"expected a path, or none"),
        ("[memory]\nhigh_watermark = 95\n", r"expected a share"),
        ("[memory]\nhigh_watermark = 0.5\n", r"above .*high_watermark 0.5"),
        ("[metrics]\nport = 70000\n", r"expected a port"),
        ("[log]\nlevel = 'loud'\n", r"expected one of DEBUG, INFO"),
        ("[nvme]\nadmission = 'never'\n", r"expected one of always, second-touch"),
        ("quota = 1\n", r"write \[quota.TENANT\]"),
        ("[quota]\nmemory_bytes = 1\n", r"quota.memory_bytes must be a tenant's section"),
        ("[quotas.a]\nmemory_bytes = 1\n", r"unknown section .* did you mean quota\?"),
        ("[quota.a]\nmemory_byte = 1\n", r"unknown key .* did you mean memory_bytes\?"),
        ("[quota.a]\nmemory_bytes = 'much'\n", r"quota.a.memory_bytes .* a size such as 4GiB"),
        ("[quota.a]\nmemory_bytes = -1\n", r"expected 0 \(no limit\) or more"),
        ("[quota.a]\nmemory_reserved_bytes = '5GiB'\n", r"lower the reservations"),
        ("[quota.a]\nnvme_bytes = '1MiB'\n", r"below nvme.segment_bytes"),
        ("[log]\nlevel = 5\n", r"expected one of DEBUG, INFO"),
        ("[nvme]\npolicy = 'fifo'\n", r"expected one of tree-gdsf, lru, s3-fifo"),
        ("[eviction]\nnvme_load_share = 1.5\n", r"expected a share of 0 to 1"),
        ("[eviction]\nattention_tokens = 0\n", r"expected more than 0"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, environ={})
    assert str(path) in str(caught.value)


def test_quotas_by_tenant(tmp_path: Path) -> None:
    text = '[quota."*"]\nmemory_bytes = "1GiB"\n[quota.a]\nnvme_reserved_bytes = "2GiB"\n'
    path = write(tmp_path, text)
    loaded = load_config(path, environ={})
    assert loaded.config.quota == {
        "*": QuotaConfig(memory_bytes=1 * GIB),
        "a": QuotaConfig(nvme_reserved_bytes=2 * GIB),
    }
    assert loaded.origins["quota.a"] == f"file {path}"


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml", environ={})


def test_the_users_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "ucm").mkdir()
    path = write(tmp_path / "ucm", "[log]\nlevel = 'ERROR'\n")
    loaded = load_config(environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert loaded.origins["log.level"] == f"file {path}"


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("UCM_SERVICE_MAX_SESSION", "did you mean UCM_SERVICE_MAX_SESSIONS"),
        ("UCM_NVME_NOTHING_LIKE_IT", "unknown setting"),
        ("UCM_QUOTA_A_MEMORY_BYTES", "unknown setting"),
        ("UCM_SEVICE_SOCKET_PATH", "did you mean UCM_SERVICE_SOCKET_PATH"),
    ],
)
def test_unknown_variables_are_errors(tmp_path: Path, variable: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_config(environ={"XDG_CONFIG_HOME": str(tmp_path), variable: "1"})


def test_other_variables_are_left_alone(tmp_path: Path) -> None:
    load_config(environ={"XDG_CONFIG_HOME": str(tmp_path), "UCM_HYPOTHESIS_PROFILE": "fast"})


def test_unknown_overrides_are_errors(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="did you mean capacity_bytes"):
        load_config(environ=environ, overrides={"memory.capcity_bytes": "1"})
    with pytest.raises(ConfigError, match="did you mean memory"):
        load_config(environ=environ, overrides={"memry.capacity_bytes": "1"})


def test_the_default_socket_follows_the_runtime_folder() -> None:
    assert default_socket_path({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path(
        "/run/user/7/ucm/ucm.sock"
    )
    assert default_socket_path({}) == Path(f"/tmp/ucm-{os.getuid()}/ucm.sock")


def test_home_is_expanded() -> None:
    value = parse_value("nvme.path", "~/kv", Path | None, origin="here", base=Path("/elsewhere"))
    assert value == Path.home() / "kv"


def test_a_number_too_large_for_any_component_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected less than 2\\^63"):
        check_value("memory.capacity_bytes", 2**63, origin="here")


def test_an_empty_path_is_not_taken_for_none(tmp_path: Path) -> None:
    """`--store "$UNSET"` must not quietly switch the NVMe tier off."""
    with pytest.raises(ConfigError, match="or none"):
        parse_value("nvme.path", "", Path | None, origin="here", base=tmp_path)
    assert parse_value("nvme.path", "none", Path | None, origin="here", base=tmp_path) is None


def test_the_codecs_that_may_be_configured_are_those_that_there_are() -> None:
    assert config.CODEC_NAMES == codecs.CODEC_NAMES
