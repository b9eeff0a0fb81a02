"""A quantised checkpoint written anew: the tensors of the files that a model was loaded from, as they came.

    files that were loaded            -> their headers, read again: the files must be the same ones
    dense weights, loaded once more   -> equal to those of the model, or nothing is written
    transformers' save_pretrained({}) -> config.json and generation_config.json, as the model has them now
    quantization_config of the files  -> config.json
    tensors                           -> copied, a piece at a time

Codes cannot be made of weights that have changed, such as those that an adapter was merged into: that is refused.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.headers import Headers, read_headers
from ...checkpoint.new_folder import CONFIG, SINGLE, new_checkpoint, write_index
from ...checkpoint.outline import Outline, outline_stored
from ...checkpoint.packed import Stored
from ...checkpoint.pretrained.dense import load_tensors
from ...checkpoint.quantised.methods import find_quantizations
from ...checkpoint.quantised.quantizer import settle_quantization
from ...checkpoint.shards import Entry, Filling, Shard, file_name, split_entries
from ...errors import CheckpointChangedError, ConfigError, SaveError
from ...files.file_stamp import FileStamp
from ...runtime.model import Runtime
from .state_dict import phantoms_only
from .unquantised import as_unquantised


@dataclass(frozen=True)
class Original:
    """The files that a model was loaded from; `experts` are the names of the tensors that experts are made of.

    `rows` says that experts were read from packed rows instead, which `pack_checkpoint` made.
    """

    folder: Path
    stamps: Mapping[Path, FileStamp]
    experts: frozenset[str]
    rows: bool
    quantization: Any

    @classmethod
    def of(cls, found: Outline | None) -> Original | None:
        """None for a model that came from no files."""
        if found is None or found.folder is None or found.stored is None or found.index is None:
            return None
        said = json.loads((found.folder / CONFIG).read_text(encoding="utf-8"))
        quantization = next((each for _, each in find_quantizations(said)), None)
        stored, rows = found.stored, found.stored.rows is not None
        return cls(found.folder, dict(stored.headers.stamps), found.index.keys, rows, quantization)

    def write(self, model: Any, out: Path, limit_bytes: int, write_config: Callable[..., None]) -> None:
        """`write_config(folder, limit_bytes=...)` writes everything but weights. Raises as `Saver.save_pretrained`."""
        headers = self._read_headers()
        self._refuse_changed(model, headers)
        entries = [Entry.of(key, found) for key, found in headers.items()]
        runs = split_entries(entries, limit_bytes)
        names = [SINGLE] if len(runs) == 1 else [file_name("model", n, len(runs)) for n in range(1, len(runs) + 1)]
        with new_checkpoint(out, sum(entry.nbytes for entry in entries)) as folder:
            with as_unquantised(model):
                write_config(folder, limit_bytes=limit_bytes)
            for file in folder.glob("*.safetensors"):  # of no tensors
                file.unlink()
            self._say_quantized(folder)
            shards = [Shard.of(name, run) for name, run in zip(names, runs, strict=True)]
            with contextlib.closing(Filling(folder, shards)) as files:
                outline_stored(folder, Stored(files.ranges))  # raises for what could not be loaded
                for key, found in headers.items():
                    files.copy(key, found)
                self._check_files(self._read_headers().stamps)
                files.check_complete()
            if len(runs) > 1:
                write_index(folder, files.ranges, sum(param.numel() for param in model.parameters()))

    def _read_headers(self) -> Headers:
        headers = read_headers(self.stamps)
        self._check_files(headers.stamps)
        for key, (dtype, file) in headers.unreadable.items():
            raise SaveError(
                f"{file}: {key!r} is of dtype {dtype}, which torch {torch.__version__} does not have; nothing was "
                "written. Copy the files themselves"
            )
        return headers

    def _check_files(self, found: Mapping[Path, FileStamp]) -> None:
        for file, stamp in self.stamps.items():
            if stamp.followed_by(found[file], file) is None:
                raise CheckpointChangedError(
                    f"{file}: was modified since the model was loaded, so that its tensors are not those that came; "
                    "nothing was written. Load the model again, or save it without packed="
                )

    def _refuse_changed(self, model: Any, headers: Headers) -> None:
        config = copy.deepcopy(model.config)
        config.quantization_config = copy.deepcopy(self.quantization)  # as a loader expects it, and not as it leaves it
        settle_quantization(config)
        came = load_tensors(model, config, headers, self.experts, self.folder).state_dict()
        with phantoms_only():
            state = model.state_dict()
        changed = [key for key in {**state, **came} if not _same(state.get(key), came.get(key))]
        if changed:
            raise SaveError(
                f"save_pretrained(packed=True) writes the tensors that came, and {len(changed)} weights of the model "
                f"are others now, such as {changed[0]} (an adapter was merged into it, or it was replaced); nothing "
                "was written. Save without packed=, as bfloat16 weights, or load the checkpoint again"
            )

    def _say_quantized(self, folder: Path) -> None:
        file = folder / CONFIG
        said = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": self.quantization}
        file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def packed_original(
    original: Original | None, runtime: Runtime, adapted: bool, state_dict: Mapping[str, Tensor] | None
) -> Original:
    """The files to write anew. Raises `ConfigError` where there are none, or not their tensors are asked for."""
    if original is None:
        why = "the model was loaded by transformers, or is a part of another: copy the files that it came from"
    elif not any(layer.moe.packed for layer in runtime.layers):
        why = "its experts are not quantised: leave packed= out, and their tensors are written as they are"
    elif original.rows:
        why = f"its experts were read from packed rows; copy the checkpoint that {original.folder} was made of"
    elif adapted:
        why = "the model has an adapter, of which alone save_pretrained writes the weights: leave packed= out"
    elif state_dict is not None:
        why = "state_dict= says which weights to write, and codes cannot be made of them: leave one of the two out"
    else:
        return original
    raise ConfigError(f"save_pretrained(packed=True) does not work here: {why}")


def _same(now: Tensor | None, came: Tensor | None) -> bool:
    """Bit for bit; what is on meta belongs to experts, which cannot be changed."""
    if now is None or came is None or came.is_meta:
        return came is not None and came.is_meta
    alike = now.shape == came.shape and now.dtype == came.dtype
    return alike and torch.equal(now.reshape(-1).view(torch.uint8), came.reshape(-1).view(torch.uint8))
