"""Where the rows of each layer are read from: the checkpoint they came from, a spill file, or RAM."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.packed import index_stored, read_stored
from ...checkpoint.row_index import RowIndex
from ...config.settings import OffloadConfig
from ...errors import CheckpointError, UnsupportedModelError
from ...experts import MoELayer
from ...observe.progress import show_bar
from ..buffers import map_pages, page_aligned
from ..numa import node_of
from ..transfer import pinned
from . import Store
from .disk import DiskStore
from .host import HostStore, pack_rows
from .spill import spill_layers

VARIANT = re.compile(r"model\.(?!safetensors).+\.safetensors")  # as model.fp16-00001-of-00002.safetensors


def open_stores(
    moe_layers: Sequence[MoELayer],
    tiers: Sequence[str],
    settings: OffloadConfig,
    device: str = "cpu",
    index: RowIndex | None = None,
) -> list[Store]:
    """One store per layer; layers that share a file share the store. Closes what it opened if it cannot open all.

    `index` says where the rows of experts on the meta device lie. Rows in RAM below a CUDA `device` are pinned, as far
    as the system allows.
    """
    with contextlib.ExitStack() as undo:
        stores: dict[int, Store] = {}
        absent = [moe for moe in moe_layers if moe.is_meta]
        if absent:
            if index is None:
                raise AssertionError(f"{absent[0].name}: nothing says where its rows lie")
            checkpoint = undo.enter_context(contextlib.closing(DiskStore([moe.layout for moe in moe_layers], index)))
            stores |= {moe.index: checkpoint for moe in absent}
        loaded = [moe for moe in moe_layers if moe.index not in stores and tiers[moe.index] == "disk"]
        if loaded:
            folder = Path(settings.offload_folder or tempfile.gettempdir())
            with show_bar("Spilling", sum(moe.nbytes for moe in loaded)) as shown:
                spilled = undo.enter_context(contextlib.closing(spill_layers(moe_layers, loaded, folder, shown.update)))
            stores |= {moe.index: spilled for moe in loaded}
        in_ram = [moe for moe in moe_layers if tiers[moe.index] == "host"]
        if in_ram:
            rows = [torch.empty((0, moe.layout.row_bytes), dtype=torch.uint8, device="cpu") for moe in moe_layers]
            with show_bar("Loading", sum(moe.nbytes for moe in in_ram), what="experts") as shown:
                for moe in in_ram:
                    rows[moe.index] = _rows_in_ram(moe, stores.get(moe.index), shown.update, device)
            if device == "cpu":
                host = HostStore(rows)
            else:
                held = {moe.index: rows[moe.index] for moe in in_ram}
                unpin = partial(pinned.unpin_layers, held, device)
                undo.callback(unpin)  # before the first is pinned: Ctrl-C may come between two
                host = HostStore(rows, pinned.pin_layers(held, device), unpin)
            stores |= {moe.index: host for moe in in_ram}
        if absent and checkpoint not in stores.values():
            checkpoint.close()  # every row of it has gone to RAM
        undo.pop_all()
        return [stores[moe.index] for moe in moe_layers]


def read_first(stores: Sequence[Store], moe: MoELayer) -> torch.Tensor:
    """The first expert's row of a layer."""
    row = page_aligned(moe.layout.row_bytes)
    stores[moe.index].read(moe.index, 0, row.numpy().data)
    return row


def _rows_in_ram(moe: MoELayer, store: Store | None, progress: Callable[[int], object], device: str) -> torch.Tensor:
    huge, node = device != "cpu", None if device == "cpu" else node_of(device)
    if store is None:
        rows = pack_rows(moe, huge, node)
        progress(rows.nbytes)
        return rows
    rows = map_pages(moe.nbytes, huge, node).view(moe.num_experts, -1)
    for e in range(moe.num_experts):
        store.read(moe.index, e, memoryview(rows[e].numpy()))
        progress(rows[e].nbytes)
    return rows


def index_absent(model: nn.Module, moe_layers: Sequence[MoELayer]) -> tuple[Sequence[MoELayer], RowIndex | None]:
    """The layers, and where the rows of those on the meta device lie: in the folder that the model's configuration
    names."""
    if not any(moe.is_meta for moe in moe_layers):
        return moe_layers, None
    index = _find_rows(model, moe_layers)
    indexed = index.pack(moe_layers)
    return [found if moe.is_meta else moe for moe, found in zip(moe_layers, indexed, strict=True)], index


def _find_rows(model: nn.Module, moe_layers: Sequence[MoELayer]) -> RowIndex:
    config: Any = model.config
    folder = Path(getattr(config, "_name_or_path", "") or "")
    if not str(folder) or not folder.is_dir():
        raise CheckpointError(
            f"the experts of {type(model).__name__} are on the meta device, but its config names no local checkpoint "
            "folder to read them from; use moe_offload.from_pretrained(path, budget)"
        )
    _refuse_others(folder)
    index = index_stored(model, moe_layers, read_stored(folder, config))
    if any(index.packings):
        raise UnsupportedModelError(
            f"{folder}: its experts are quantised, and those of a model that was loaded without them cannot be read "
            "from it; use moe_offload.from_pretrained(path, budget)"
        )
    return index


def _refuse_others(folder: Path) -> None:
    """A configuration keeps the folder that a model is from, and neither its `subfolder` nor its `variant`: where there
    are several, the experts of another one might be read, and would fit."""
    inner = [file.parent for level in ("*", "*/*") for file in folder.glob(f"{level}/config.json")]
    others = [file for file in folder.iterdir() if VARIANT.fullmatch(file.name)]
    others += [place for place in inner if any(place.glob("*.safetensors"))]
    if others:
        raise CheckpointError(
            f"{folder}: the experts on the meta device are to be read from it, but it holds other weights as well "
            f"({', '.join(sorted(str(other.relative_to(folder)) for other in others)[:3])}), and the model's "
            "configuration does not say which ones it is from; use moe_offload.from_pretrained(path, budget), with "
            "the subfolder= or variant= that is meant"
        )
