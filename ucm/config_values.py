"""One configuration value: text or TOML in, the field's type out, range checked.

*bytes*   a number of bytes, or text such as `512MiB`, `4GiB`, `1.5 TB`
*_s       seconds
path      `~` is expanded; a relative one starts at the file's folder, or the current one
tuple     numbers: a TOML list, or text with commas
none      as text switches an optional path off
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .config import CODEC_NAMES, POLICY_NAMES
from .errors import ConfigError

Value = int | float | str | Path | tuple[int, ...] | None
"""What a field may hold."""

FieldType = object
"""A field's resolved annotation: int, float, str, Path, Path | None or tuple[int, ...]."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)
_UNITS: Final = {
    "": 1, "b": 1,
    "k": 1 << 10, "kb": 10**3, "kib": 1 << 10, "ki": 1 << 10,
    "m": 1 << 20, "mb": 10**6, "mib": 1 << 20, "mi": 1 << 20,
    "g": 1 << 30, "gb": 10**9, "gib": 1 << 30, "gi": 1 << 30,
    "t": 1 << 40, "tb": 10**12, "tib": 1 << 40, "ti": 1 << 40,
}  # fmt: skip
_LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
ADMISSIONS: Final = ("always", "second-touch")
_IO_KINDS: Final = ("auto", "posix", "pinned", "kvikio-compat", "gds")
_NO_UID: Final = 2**32 - 1
_MAY_BE_ZERO: Final = frozenset(
    {
        "memory.prefault_bytes",
        "metrics.port",
        "nvme.max_read_bytes_per_s",
        "service.max_crowded_loads",
    }
)


def closest(name: str, known: Sequence[str]) -> str:
    """A hint for a name that is not in `known`: `; did you mean X?`, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {matches[0]}?" if matches else ""


def parse_size(text: str) -> int:
    """Bytes that `text` says: `4GiB`, `250 MB`, `4096`.

    Raises:
        ValueError: it says nothing of the kind.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(text)
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def parse_value(name: str, raw: object, kind: FieldType, *, origin: str, base: Path) -> Value:
    """Make `raw` the type of the field `name`.

    Args:
        name: `section.field`, for messages and units.
        raw: a TOML value, or text from the environment or the command line.
        kind: the field's annotation.
        origin: where `raw` came from, for messages.
        base: folder that a relative path starts from.

    Raises:
        ConfigError: `raw` cannot be that.
    """
    try:
        return _parse(name, raw, kind, base)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{origin}: {name} is {raw!r}, expected {expected(name, kind)}"
        ) from error


def _parse(name: str, raw: object, kind: FieldType, base: Path) -> Value:
    if kind is int:
        return _parse_int(name, raw)
    if kind is float:
        return _parse_float(raw)
    if kind is str:
        return _text(raw)
    if kind is Path:
        return _parse_path(raw, base)
    if kind == Path | None:
        return None if _text(raw).lower() == "none" else _parse_path(raw, base)
    assert kind == tuple[int, ...], f"{name}: no parser for {kind}"
    items = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(items, list):
        raise TypeError(raw)
    return tuple(_parse_int(name, item) for item in items if item != "")


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise TypeError(raw)
    return raw


def _parse_int(name: str, raw: object) -> int:
    if isinstance(raw, str):
        return parse_size(raw) if _is_size(name) else int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise TypeError(raw)
    return raw


def _is_size(name: str) -> bool:
    """Whether a field counts bytes: `capacity_bytes`, `inflight_bytes_per_session`."""
    return "_bytes" in name


def _parse_float(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise TypeError(raw)
    return float(raw)


def _parse_path(raw: object, base: Path) -> Path:
    text = _text(raw)
    if not text or "\0" in text:
        raise ValueError(text)
    return base / Path(text).expanduser()


def expected(name: str, kind: FieldType) -> str:
    """What the field takes, in words."""
    if _is_size(name):
        return "a size such as 4GiB or a number of bytes"
    if name.endswith("_s"):
        return "a number of seconds"
    if kind is int:
        return "a whole number"
    if kind is float:
        return "a number"
    if kind == tuple[int, ...]:
        return "a list of whole numbers"
    if kind == Path | None:
        return "a path, or none"
    if _names(name):
        return "one of " + ", ".join(_names(name))
    return "a path" if kind is Path else "text"


def _names(name: str) -> tuple[str, ...]:
    """The only values that a field of text takes; none if it takes any."""
    if name == "log.level":
        return _LOG_LEVELS
    if name == "nvme.admission":
        return ADMISSIONS
    if name == "nvme.io":
        return _IO_KINDS
    if name == "nvme.codec":
        return CODEC_NAMES
    return POLICY_NAMES if name.endswith(".policy") else ()


def check_value(name: str, value: Value, *, origin: str) -> None:
    """Refuse a value that no component could work with.

    Raises:
        ConfigError: out of range; the message says which range.
    """
    problem = _problem(name, value)
    if problem:
        raise ConfigError(f"{origin}: {name} is {value}, {problem}")


def _problem(name: str, value: Value) -> str:
    names = _names(name)
    if names:
        return "" if value in names else f"expected one of {', '.join(names)}"
    if name == "eviction.nvme_load_share":
        assert isinstance(value, float)
        return "" if 0 <= value <= 1 else "expected a share of 0 to 1"
    if name == "metrics.port":
        assert isinstance(value, int)
        return "" if 0 <= value < 65536 else "expected a port, 1 to 65535, or 0 for none"
    if name == "service.max_message_bytes":
        assert isinstance(value, int)
        return "" if 0 < value < 2**31 else "expected more than 0 and less than 2GiB"
    if isinstance(value, tuple):
        return "" if all(0 <= item < _NO_UID for item in value) else "expected user ids"
    if name.endswith(("_watermark", "_share")):
        assert isinstance(value, float)
        return "" if 0 < value <= 1 else "expected a share above 0 and up to 1"
    if isinstance(value, (int, float)) and not (name in _MAY_BE_ZERO and value == 0):
        wrong = "expected less than 2^63" if value >= 2**63 else "expected more than 0"
        return "" if 0 < value < 2**63 else wrong
    return ""
