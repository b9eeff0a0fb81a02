"""Save an offloaded model: the ordinary Hugging Face layout, with the real experts, a row at a time.

transformers itself writes the configuration and the dense weights, from the model as it is now (an adapter may have
been merged into them). The experts' names, shapes and layout are what transformers would make of them in reverse, asked
on the meta device; where each expert's bytes go is then found by `checkpoint/row_index.py`, in the same way as for a
checkpoint that is read:

    transformers' save_pretrained(dense)        -> config.json, generation_config.json, model-00001-of-00004.safetensors
    revert_weight_conversion(experts on meta)   -> names, shapes        -> headers of model-00002 ... 00004
    index_rows(model, those headers)            -> for each expert: its ranges, and the steps to undo
    row of expert e from its store              -> bytes                -> written into those ranges

Where all of it fits in one file, the dense weights are copied into that file, model.safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...checkpoint.conversion import restore_tensors
from ...checkpoint.headers import Headers, read_headers
from ...checkpoint.new_folder import SINGLE, folder_to_write, new_checkpoint, write_index
from ...checkpoint.row_index import Piece, index_rows
from ...checkpoint.shards import Entry, Filling, Shard, file_name, split_entries
from ...config.sizes import parse_size
from ...errors import ConfigError, OffloadError, SaveError
from ...experts import MoELayer
from ...observe.progress import show_bar
from ...runtime.layer import LayerRuntime
from ...runtime.model import Runtime
from .original import Original, packed_original
from .state_dict import fill_state_dict, phantoms_only, refuse_phantoms
from .unquantised import as_unquantised

Layers = list[tuple[MoELayer, LayerRuntime]]

_REFUSED = {
    "push_to_hub": "call model.push_to_hub(repo_id), which saves to a temporary folder and uploads that",
    "variant": "save without it and rename the files",
    "distributed_checkpoint": "an offloaded model is in one process; save without it",
}


def save_real_rows(model: nn.Module, runtime: Runtime, original: Original | None) -> None:
    """Make state_dict() return real weights in place of phantoms, and save_pretrained() stream them.

    `original` are the files that the model came from, where it was loaded from files.
    """
    from transformers import PreTrainedModel

    fill_state_dict(runtime)
    experts = {id(module) for layer in runtime.layers for module in layer.moe.modules}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(id(inner) in experts for inner in module.modules()):
            whole = original if module is model else None
            module.__dict__["save_pretrained"] = Saver(module, runtime, whole).save_pretrained


class Saver:
    """Saves `model`, which has some or all of the layers of `runtime`; `original` are the files that it came from."""

    def __init__(self, model: Any, runtime: Runtime, original: Original | None):
        self.model, self.runtime, self.original = model, runtime, original
        self.save_plainly = model.save_pretrained

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        packed: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the model to a folder, as transformers' own `save_pretrained` does, one expert in memory at a time.

        The result has the same tensors as that of the model that is not offloaded, and loads with plain transformers.
        Of a quantised checkpoint it has the weights themselves, in the model's dtype, and no quantization_config; with
        `packed` it has the tensors of the files that were loaded, as they came, and their quantization_config. Then the
        dense weights are loaded a second time, to see that they are still those of the files.
        It is written beside what is in the folder and takes its place at the end: after an error or Ctrl-C the folder
        is as it was, and after a kill it has the old checkpoint or the new one. Forwards in other threads wait
        meanwhile. With `state_dict`, exactly those tensors are written, by transformers; of a model with an adapter,
        the adapter alone.

        Raises `SaveError` when the folder is the one that experts are read from, cannot be written or has no room
        (stating bytes needed and free), or when weights were changed that `packed` would write as they came;
        `ClosedError` after `close`, `ConfigError` for an argument that is not supported, `CheckpointChangedError`
        where the files that were loaded have changed, and what reading a row raises.
        """
        for name, advice in _REFUSED.items():
            if {"push_to_hub": push_to_hub, **kwargs}.get(name):
                raise ConfigError(f"save_pretrained({name}=...) does not work on an offloaded model: {advice}")
        if not is_main_process:
            return
        limit_bytes, out = parse_size(max_shard_size), folder_to_write(save_directory, SaveError)
        with self.runtime.lock:
            self.runtime.check_open()
            adapted = getattr(self.model, "_hf_peft_config_loaded", False)
            if packed:
                original = packed_original(self.original, self.runtime, adapted, state_dict)
                self._refuse_source(out)
                original.write(self.model, out, limit_bytes, partial(self._write_dense, state={}, **kwargs))
                return
            with as_unquantised(self.model):
                if adapted:  # only the adapter is written
                    self._write_given(out, self._phantom_state(), limit_bytes, 0, **kwargs)
                    return
                self._refuse_source(out)
                if state_dict is None:
                    self._stream(out, limit_bytes, **kwargs)
                    return
                refuse_phantoms(state_dict)
                self._write_given(out, state_dict, limit_bytes, sum(t.nbytes for t in state_dict.values()), **kwargs)

    def _stream(self, out: Path, limit_bytes: int, **kwargs: Any) -> None:
        layers = self._layers()
        moe_layers = [moe for moe, _ in layers]
        names = {f"{name}.{place.key}" for moe in moe_layers for name in moe.names for place in moe.own_places}
        dense = {key: tensor for key, tensor in self._phantom_state().items() if key not in names}
        entries = self._expert_entries(moe_layers, kwargs.get("save_original_format", True))
        dense_bytes, expert_bytes = (sum(each.nbytes for each in group) for group in (dense.values(), entries))
        twice = dense_bytes if dense_bytes + expert_bytes <= limit_bytes else 0
        with new_checkpoint(out, dense_bytes + expert_bytes + twice) as folder:
            self._write_dense(folder, dense, limit_bytes, **kwargs)
            headers = read_headers(sorted(folder.glob("*.safetensors")))
            if sum(found.nbytes for found in headers.values()) + expert_bytes <= limit_bytes:
                self._write_one_file(folder, layers, headers, entries)
            else:
                self._write_shards(folder, layers, split_entries(entries, limit_bytes))

    def _write_one_file(self, folder: Path, layers: Layers, dense: Headers, entries: list[Entry]) -> None:
        """As transformers does where everything fits in a file: no number in its name, and no index."""
        run = [*(Entry.of(key, found) for key, found in dense.items()), *entries]
        with contextlib.closing(Filling(folder, [Shard.of("whole.safetensors", run)])) as files:
            for key, found in dense.items():
                files.copy(key, found)
            self._write_rows(layers, files)
        (folder / "whole.safetensors").replace(folder / SINGLE)  # which had the dense weights

    def _write_shards(self, folder: Path, layers: Layers, runs: Sequence[tuple[Entry, ...]]) -> None:
        dense_files = sorted(folder.glob("*.safetensors"))
        first, count = len(dense_files) + 1, len(dense_files) + len(runs)
        for number, file in enumerate(dense_files, 1):
            file.rename(folder / file_name("model", number, count))
        headers = read_headers(sorted(folder.glob("*.safetensors")))
        shards = [Shard.of(file_name("model", number, count), run) for number, run in enumerate(runs, first)]
        with contextlib.closing(Filling(folder, shards)) as files:
            self._write_rows(layers, files)
        headers.update(files.ranges)
        write_index(folder, headers, self.model.num_parameters())

    def _write_given(
        self, out: Path, state: Mapping[str, Tensor], limit_bytes: int, needed_bytes: int, **kwargs: Any
    ) -> None:
        with new_checkpoint(out, needed_bytes) as folder:
            self._write_dense(folder, state, limit_bytes, **kwargs)

    def _write_dense(self, folder: Path, state: Mapping[str, Tensor], limit_bytes: int, **kwargs: Any) -> None:
        """What transformers writes by itself: configurations, and the tensors of `state`."""
        try:
            self.save_plainly(folder, state_dict=dict(state), max_shard_size=limit_bytes, **kwargs)
        except SafetensorError as error:  # its wrapping of what the operating system says
            raise OSError(str(error)) from error

    def _write_rows(self, layers: Layers, files: Filling) -> None:
        moe_layers = [moe for moe, _ in layers]
        with phantoms_only(), _layout_errors():
            index = index_rows(self.model, moe_layers, files.ranges)
        with show_bar("Saving", sum(moe.nbytes for moe in moe_layers), what="experts") as shown:
            for moe, layer in layers:
                fields = {field.name: field for field in layer.moe.unpacked.fields}
                for e, pieces in enumerate(index.rows[moe.index]):
                    row = self.runtime.read_unpacked(layer.moe.index, e)
                    for piece in pieces:  # its place in a row is that of a model loaded from the new files
                        _write_field(piece, fields[piece.field.name].view_in(row), files)
                    shown.update(len(row))
        files.check_complete()

    def _layers(self) -> Layers:
        """The model's layers, each with its experts' names as seen from the model: it may be part of a larger one."""
        names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        found: Layers = []
        for layer in self.runtime.layers:
            own = tuple(name for module in layer.moe.modules for name in names.get(id(module), []))
            if own:
                found.append((dataclasses.replace(layer.moe.as_unpacked(), index=len(found), names=own), layer))
        return found

    def _expert_entries(self, moe_layers: Sequence[MoELayer], original_format: bool) -> list[Entry]:
        """Every tensor of experts that is to be written, in the order of layers and experts."""
        from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

        stacked = {
            f"{moe.name}.{place.key}": torch.empty(place.tensor.shape, dtype=place.tensor.dtype, device="meta")
            for moe in moe_layers
            for place in moe.own_places
        }
        with _layout_errors():
            stored = revert_weight_conversion(self.model, stacked) if original_format else stacked
        return [
            Entry(key, stored[key].dtype, tuple(stored[key].shape), stored[key].nbytes)
            for key in sorted(stored, key=dot_natural_key)
        ]

    def _phantom_state(self) -> dict[str, Tensor]:
        with phantoms_only():
            return dict(self.model.state_dict())

    def _refuse_source(self, out: Path) -> None:
        for folder in self.runtime.folders():
            if out.exists() and out.samefile(folder):
                raise SaveError(
                    f"{out}: the experts of this model are read from there, so it cannot be saved over it; nothing was "
                    "written. Save to another folder, close the model, and then put the one in the other's place"
                )


def _write_field(piece: Piece, field: Tensor, files: Filling) -> None:
    """Write one field of an expert into the tensors that it is loaded from."""
    parts = restore_tensors(piece.conversions, field, [source.shape for source in piece.sources])
    for source, part in zip(piece.sources, parts, strict=True):
        files.write(source, part.contiguous().view(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _layout_errors() -> Iterator[None]:
    """Turn errors about a checkpoint that does not fit into a `SaveError`: here it is the one that is to be written."""
    try:
        yield
    except (OffloadError, ValueError) as error:
        raise SaveError(
            f"the experts cannot be written as the model's own checkpoints have them: {error}. "
            "save_pretrained(..., save_original_format=False) writes them as the model holds them"
        ) from error
