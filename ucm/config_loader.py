"""Fill `Config` from the command line, the environment, a TOML file and the defaults.

    command line  >  UCM_<SECTION>_<FIELD>  >  TOML file  >  default

The file is the one that `--config` names, else the first of `$XDG_CONFIG_HOME/ucm/ucm.toml` and
`/etc/ucm/ucm.toml` that exists. An unknown section or key is an error with a hint, and so is a
value of the wrong type or out of range. The origin of every value is kept.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Final, get_type_hints

import platformdirs

from .config import (
    CollectionsConfig,
    Config,
    EvictionConfig,
    LogConfig,
    MemoryConfig,
    MetricsConfig,
    NvmeConfig,
    QuotaConfig,
    ServiceConfig,
    SummariesConfig,
    TransferConfig,
)
from .config_values import FieldType, Value, check_value, closest, parse_value
from .errors import ConfigError
from .shares import memory_shares, nvme_shares

Section = (
    ServiceConfig
    | MemoryConfig
    | NvmeConfig
    | EvictionConfig
    | SummariesConfig
    | CollectionsConfig
    | TransferConfig
    | MetricsConfig
    | LogConfig
)

SECTIONS: Final[Mapping[str, type[Section]]] = {
    "service": ServiceConfig,
    "memory": MemoryConfig,
    "nvme": NvmeConfig,
    "eviction": EvictionConfig,
    "summaries": SummariesConfig,
    "collections": CollectionsConfig,
    "transfer": TransferConfig,
    "metrics": MetricsConfig,
    "log": LogConfig,
}

ENV_PREFIX: Final = "UCM_"
_BARE_SIZE: Final = re.compile(
    r"^[ \t]*(\w+)[ \t]*=[ \t]*(\d[\d.]*[ \t]*[KMGT]i?B?)[ \t]*(?:#.*)?$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: Config
    origins: Mapping[str, str]
    """`section.field` -> `default`, `file PATH`, `environment NAME` or `command line`; of quotas
    `quota.TENANT` -> `file PATH`."""


def load_config(
    config_path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read every source and put them over one another.

    Args:
        config_path: the file to read; it must exist. None looks in the usual places.
        environ: the environment; this process's when None.
        overrides: `section.field` -> text, from the command line.

    Raises:
        ConfigError: a file that is missing or not TOML, an unknown name, a bad value. The message
            names the source, the key and what was expected.
    """
    env = os.environ if environ is None else environ
    values: dict[str, Value] = _defaults(env)
    origins = dict.fromkeys(values, "default")
    path = config_path or _find_file(env)
    tables = _read_tables(path) if path else {}
    quotas = _read_quotas(tables.pop("quota", {}), f"file {path}")
    layers = (
        _read_file(tables, f"file {path}"),
        _read_environment(env),
        {_known(name, "command line"): (text, "command line") for name, text in overrides.items()}
        if overrides
        else {},
    )
    for layer in layers:
        for name, (raw, origin) in layer.items():
            base = path.parent if path and origin.startswith("file") else Path.cwd()
            values[name] = parse_value(name, raw, FIELD_TYPES[name], origin=origin, base=base)
            origins[name] = origin
    for name, value in values.items():
        check_value(name, value, origin=origins[name])
    _check_watermarks(values, origins)
    origins |= {f"quota.{tenant}": f"file {path}" for tenant in quotas}
    config = _build(values, quotas)
    _check_quotas(config, f"file {path}")
    return LoadedConfig(config, MappingProxyType(origins))


def default_socket_path(environ: Mapping[str, str]) -> Path:
    """The gRPC socket in the user's runtime folder, or in one of ours under /tmp."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "ucm" if runtime else Path(f"/tmp/ucm-{os.getuid()}")  # noqa: S108
    return folder / "ucm.sock"


def default_store_path() -> Path:
    """The data folder in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("ucm")) / "store"


def _field_types() -> dict[str, FieldType]:
    types: dict[str, FieldType] = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        types |= {f"{section}.{item.name}": hints[item.name] for item in fields(cls)}
    return types


FIELD_TYPES: Final[Mapping[str, FieldType]] = _field_types()
"""Type of every `section.field`."""


def _defaults(environ: Mapping[str, str]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for section, cls in SECTIONS.items():
        empty = cls()
        values |= {f"{section}.{item.name}": getattr(empty, item.name) for item in fields(cls)}
    values["service.socket_path"] = default_socket_path(environ)
    values["nvme.path"] = default_store_path()
    return values


def _find_file(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("XDG_CONFIG_HOME")
    user = Path(home) if home else Path.home() / ".config"
    for path in (user / "ucm" / "ucm.toml", Path("/etc/ucm/ucm.toml")):
        if path.is_file():
            return path
    return None


def _read_tables(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path} is not valid TOML: {error}{_size_hint(path)}") from error


def _size_hint(path: Path) -> str:
    """What is wrong with a file that is no TOML, if it is a size without quotes."""
    bare = _BARE_SIZE.search(path.read_text(encoding="utf-8", errors="replace"))
    if bare is None:
        return ""
    return f'; a size with a unit is text, put it into quotes: {bare[1]} = "{bare[2]}"'


def _read_file(tables: Mapping[str, object], origin: str) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            _check_is_below_a_section(section, table, origin)
            raise ConfigError(
                f"{origin}: unknown section [{section}]{closest(section, [*SECTIONS, 'quota'])}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{origin}: {section} must be a section: write [{section}]")
        for key, raw in table.items():
            found[_known(f"{section}.{key}", origin)] = (raw, origin)
    return found


def _check_is_below_a_section(key: str, value: object, origin: str) -> None:
    """Say where a key belongs that stands before the first section."""
    homes = [name.split(".")[0] for name in FIELD_TYPES if name.split(".")[1] == key]
    if homes and not isinstance(value, dict):
        sections = ", ".join(f"[{home}]" for home in homes)
        raise ConfigError(f"{origin}: {key} stands before any section; write it below {sections}")


def _read_quotas(tables: object, origin: str) -> dict[str, QuotaConfig]:
    """The sections `[quota.TENANT]` by tenant."""
    if not isinstance(tables, dict):
        raise ConfigError(f"{origin}: quota must be sections: write [quota.TENANT]")
    known = [item.name for item in fields(QuotaConfig)]
    quotas: dict[str, QuotaConfig] = {}
    for tenant, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{origin}: quota.{tenant} must be a tenant's section: write [quota.TENANT] with "
                f"{', '.join(known)}"
            )
        values: dict[str, int] = {}
        for key, raw in table.items():
            name = f"quota.{tenant}.{key}"
            if key not in known:
                hint = closest(key, known)
                raise ConfigError(f"{origin}: unknown key {key!r} in [quota.{tenant}]{hint}")
            value = parse_value(name, raw, int, origin=origin, base=Path.cwd())
            assert isinstance(value, int)
            if not 0 <= value < 2**63:
                raise ConfigError(f"{origin}: {name} is {value}, expected 0 (no limit) or more")
            values[key] = value
        quotas[tenant] = QuotaConfig(**values)
    return quotas


def env_name(name: str) -> str:
    """`UCM_SECTION_FIELD` for `section.field`."""
    return ENV_PREFIX + name.replace(".", "_").upper()


def _read_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    by_env = {env_name(name): name for name in FIELD_TYPES}
    sections = tuple(f"{ENV_PREFIX}{section.upper()}_" for section in (*SECTIONS, "quota"))
    found: dict[str, tuple[object, str]] = {}
    for variable, text in environ.items():
        if variable in by_env:
            found[by_env[variable]] = (text, f"environment {variable}")
        elif variable.startswith(ENV_PREFIX):
            hint = closest(variable, list(by_env))
            # A name of ours that is not a setting is somebody's business, unless it looks
            # like a setting that was spelt wrongly: then silence would hide the mistake.
            if hint or variable.startswith(sections):
                raise ConfigError(f"environment: unknown setting {variable}{hint}")
    return found


def _known(name: str, origin: str) -> str:
    if name not in FIELD_TYPES:
        section, _, key = name.partition(".")
        keys = [other.split(".")[1] for other in FIELD_TYPES if other.startswith(section + ".")]
        if not keys:
            raise ConfigError(
                f"{origin}: unknown section {section!r}{closest(section, list(SECTIONS))}"
            )
        raise ConfigError(f"{origin}: unknown key {key!r} in [{section}]{_closest_key(key, keys)}")
    return name


def _closest_key(key: str, keys: list[str]) -> str:
    """As `closest`; also for a key that was written without its unit."""
    longer = [other for other in keys if other.startswith(key + "_")]
    return f"; did you mean {longer[0]}?" if len(longer) == 1 else closest(key, keys)


def _check_watermarks(values: Mapping[str, Value], origins: Mapping[str, str]) -> None:
    for tier in ("memory", "nvme"):
        low, high = values[f"{tier}.low_watermark"], values[f"{tier}.high_watermark"]
        assert isinstance(low, float)
        assert isinstance(high, float)
        if low > high:
            raise ConfigError(
                f"{tier}.low_watermark is {low} ({origins[f'{tier}.low_watermark']}), above "
                f"{tier}.high_watermark {high} ({origins[f'{tier}.high_watermark']}); lower it"
            )


def _check_quotas(config: Config, origin: str) -> None:
    try:
        memory_shares(config)
        nvme_shares(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _build(values: Mapping[str, Value], quotas: Mapping[str, QuotaConfig]) -> Config:
    parts: dict[str, Section] = {}
    for section, cls in SECTIONS.items():
        own = {item.name: values[f"{section}.{item.name}"] for item in fields(cls)}
        parts[section] = cls(**own)  # type: ignore[arg-type]  # parse_value made the types
    return Config(**parts, quota=quotas)  # type: ignore[arg-type]
