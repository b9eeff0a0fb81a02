"""KV caches on disk: a safetensors file each, whole or not at all, of one model and one set of versions.

    FOLDER/<identity of the model>/<hash of the tokens>.safetensors      ids, and keys and values of each layer

All files together are bounded: the least recently used go. A file that is damaged, or of something else, is as if it
were not there, and said once. What is in such a file is what was read and said, so it is readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from ...errors import ConfigError
from ...files.whole_file import save_whole
from .kv_slices import CUTTABLE, WINDOW, lengths

logger = logging.getLogger("moe_offload")

SUFFIX = ".safetensors"
MOST_BYTES = 4 * 10**9  # of all files in a folder


class PromptFolder:
    """The caches of one model in a folder.

    Args:
        path: The folder; made if it is not there.
        identity: What tells the model, its weights and the versions that run it from others (`model.py`).
        new_cache: Gives an empty cache of the model's kind.
        most_bytes: For all files in it, of other models too.
    """

    def __init__(self, path: Path, identity: str, new_cache: Callable[[], Any], most_bytes: int = MOST_BYTES):
        self._root, self._folder, self._new_cache = path, path / identity, new_cache
        self._most_bytes = most_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._ids: dict[Path, list[int]] = {}
        for file in sorted(self._folder.glob(f"*{SUFFIX}")):
            with self._ignoring(file):
                self._ids[file] = _read_ids(file)

    def find(self, ids: Sequence[int], least: int) -> tuple[list[int], Any] | None:
        """The tokens and the cache of the file that begins with most of `ids`, of at least so many; None without."""
        best = max(self._ids, key=lambda file: common(self._ids[file], ids), default=None)
        if best is None or common(self._ids[best], ids) < least:
            return None
        kept = self._ids.pop(best)  # it is read once: what comes of it is written again
        with self._ignoring(best):
            cache = _read(best, kept, self._new_cache())
            with contextlib.suppress(OSError):
                os.utime(best)
            return kept, cache
        return None

    def save(self, ids: Sequence[int], cache: Any) -> None:
        """Write a cache of these tokens, in place of those it goes on from. What cannot be written is said."""
        tensors = _tensors_of(cache, len(ids))
        if tensors is None:
            return
        tensors["ids"] = torch.tensor(list(ids), dtype=torch.int32)
        file = self._folder / (hashlib.blake2b(tensors["ids"].numpy().tobytes(), digest_size=16).hexdigest() + SUFFIX)
        data = save(tensors, metadata={"checksum": _checksum(tensors)})
        if len(data) > self._most_bytes:
            return
        try:
            save_whole(file, data, "prompt cache", ConfigError)
        except ConfigError as error:
            logger.warning("%s", error)
            return
        self._ids[file] = list(ids)
        for other in [other for other, held in self._ids.items() if other != file and ids[: len(held)] == held]:
            del self._ids[other]
            with contextlib.suppress(OSError):
                other.unlink()
        self._prune()

    def _prune(self) -> None:
        """Remove the files that were not used for longest until all that are left are within the bound."""
        found = []
        for file in self._root.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self._most_bytes:
                return
            with contextlib.suppress(OSError):
                file.unlink()
            self._ids.pop(file, None)
            total -= size

    @contextlib.contextmanager
    def _ignoring(self, file: Path) -> Iterator[None]:
        """Whatever is wrong with `file` is said, and it is as if it were not there."""
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            self._ids.pop(file, None)
            logger.warning("prompt cache %s is not used: %s", file.name, str(error).splitlines()[0][:200])


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    for i, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return i
    return min(len(a), len(b))


def _tensors_of(cache: Any, tokens: int) -> dict[str, Tensor] | None:
    """Keys and values of each layer; None for a cache that has something else, or another number of tokens."""
    if lengths(cache) != {tokens} or {type(layer).__name__ for layer in cache.layers} - CUTTABLE:
        return None
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(getattr(layer, "keys", None), Tensor):
            found |= {f"{i}.keys": layer.keys.contiguous(), f"{i}.values": layer.values.contiguous()}
    return found


def _read(file: Path, ids: Sequence[int], cache: Any) -> Any:
    """`cache`, an empty one, with what `file` has for the tokens `ids`. Raises ValueError for anything else."""
    with safetensors.safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        said = (opened.metadata() or {}).get("checksum")
    if said != _checksum(tensors):
        raise ValueError("its bytes are not those that were written")
    if tensors.pop("ids").tolist() != list(ids):
        raise ValueError("it was replaced")
    for i, layer in enumerate(cache.layers):
        if f"{i}.keys" in tensors:
            keys, values = tensors.pop(f"{i}.keys"), tensors.pop(f"{i}.values")
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if type(layer).__name__ == WINDOW:
                layer.cumulative_length = len(ids)
    if tensors or lengths(cache) != {len(ids)}:
        raise ValueError("it has other layers than the model")
    return cache


def _read_ids(file: Path) -> list[int]:
    """The tokens that `file` is of. Raises ValueError where it is no file, or has none."""
    if not file.is_file():  # to open a pipe would wait for who writes into it
        raise ValueError("it is no file")
    with safetensors.safe_open(file, "pt") as opened:
        ids = opened.get_tensor("ids")
    if ids.dtype != torch.int32 or ids.dim() != 1:
        raise ValueError("its ids are no tokens")
    return [int(id) for id in ids]


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()
