"""The codecs that there are, by name and by id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ucm.errors import ConfigError

from .codec_bitplanes import BitPlanes
from .codec_fp8 import Fp8
from .codec_int4 import Int4
from .codec_int8 import Int8
from .codec_raw import Raw

if TYPE_CHECKING:
    from .codec import Codec, CodecId

RAW: Final = Raw()
BP_ZSTD: Final = BitPlanes()
CODECS: Final[tuple[Codec, ...]] = (RAW, BP_ZSTD, Int8(), Fp8(), Int4())
CODEC_NAMES: Final = tuple(codec.name for codec in CODECS)

_BY_ID: Final = {codec.codec_id: codec for codec in CODECS}
_BY_NAME: Final = {codec.name: codec for codec in CODECS}


def codec_named(name: str) -> Codec:
    """The codec that configuration calls `name`.

    Raises:
        ConfigError: there is none.
    """
    codec = _BY_NAME.get(name)
    if codec is None:
        raise ConfigError(f"there is no codec {name!r}; use one of {', '.join(CODEC_NAMES)}")
    return codec


def codec_of(codec_id: CodecId) -> Codec:
    """The codec with this id."""
    return _BY_ID[codec_id]
