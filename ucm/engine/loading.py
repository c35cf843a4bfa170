"""`load_model`: from a path to a model that computes, whatever format it is stored in.

folder with model*.safetensors + config.json     Hugging Face
folder with exactly one *.gguf                   GGUF (config.json and tokenizer.json unused)
a *.gguf file                                    GGUF
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from ucm.errors import ConfigError

from .config import ModelConfig, config_from_gguf, config_from_hf
from .gguf_weights import GgufFile
from .model import LlamaModel
from .tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from .weights import digest_files, load_safetensors, safetensors_files

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = tuple(_DTYPES)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer and what names its weights."""

    config: ModelConfig
    model: LlamaModel
    tokenizer: Tokenizer
    weights_digest: str
    """SHA-256 of the weights file, or over the digests of the shards; hex."""


def default_model_folder() -> Path:
    """Where `ucm model pull smollm2-135m` puts the model."""
    return platformdirs.user_cache_path("ucm") / "models" / "smollm2-135m"


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `fp32` or `bf16`.

    Raises:
        ConfigError: another name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(path: str | Path, dtype: torch.dtype | str = torch.float32) -> LoadedModel:
    """Load weights, configuration and tokenizer.

    Reads the weights twice (digest and tensors), the second time from the page cache. Blocks:
    about a second for 100 MB of GGUF.

    Args:
        path: a model folder or a GGUF file.
        dtype: to compute in; float32 or bfloat16, or `fp32` or `bf16`.

    Raises:
        ConfigError: nothing loadable at `path`, an unsupported model, or no tokenizer.
        CorruptionError: a file is truncated or not of its format.
    """
    resolved = _checked_dtype(dtype)
    place, shards = _locate(path)
    if shards:
        config = config_from_hf(place / "config.json")
        tokenizer = tokenizer_from_folder(place, config)
        model = LlamaModel(config, load_safetensors(shards, resolved))
        return LoadedModel(config, model, tokenizer, digest_files(shards))
    source, config = _open_gguf(place)
    tokenizer = tokenizer_from_gguf(source.metadata)
    model = LlamaModel(config, source.load(config, resolved))
    return LoadedModel(config, model, tokenizer, digest_files([place]))


def load_weights(
    path: str | Path, dtype: torch.dtype | str = torch.float32
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights by Hugging Face's names, without building a model.

    Raises:
        ConfigError: as `load_model`, but a tokenizer is not needed.
        CorruptionError: a file is truncated or not of its format.
    """
    resolved = _checked_dtype(dtype)
    place, shards = _locate(path)
    if shards:
        return config_from_hf(place / "config.json"), load_safetensors(shards, resolved)
    source, config = _open_gguf(place)
    return config, source.load(config, resolved)


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ConfigError(f"{resolved} is not supported; use float32 or bfloat16")
    return resolved


def _locate(path: str | Path) -> tuple[Path, list[Path]]:
    """(folder, its safetensors files), or (GGUF file, nothing)."""
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".gguf":
        return place, []
    if not place.is_dir():
        raise ConfigError(f"{place} is neither a model folder nor a GGUF file")
    shards = safetensors_files(place)
    return (place, shards) if shards else (find_gguf(place), [])


def _open_gguf(file: Path) -> tuple[GgufFile, ModelConfig]:
    source = GgufFile(file)
    tied = "output.weight" not in source.tensor_names
    return source, config_from_gguf(source.metadata, tied_head=tied)


def find_gguf(folder: Path) -> Path:
    """The one GGUF file of a folder.

    Raises:
        ConfigError: none, or several to choose from.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise ConfigError(
            f"{folder} holds neither model.safetensors with config.json nor a GGUF file; "
            "`ucm model pull smollm2-135m` fetches one"
        )
    if len(found) > 1:
        raise ConfigError(f"{folder} holds {len(found)} GGUF files; name the one you mean")
    return found[0]
