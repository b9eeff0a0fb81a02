"""Where the rows of each layer are read from: the checkpoint they came from, a spill file, or RAM."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.packed import index_checkpoint
from ...config.settings import OffloadConfig
from ...errors import CheckpointError
from ...experts import ExpertBank
from ...observe.progress import bar
from ..buffers import page_aligned
from ..transfer import pinned
from . import Store
from .disk import DiskStore
from .host import HostStore, pack_rows
from .spill import spill


def open_stores(
    model: nn.Module, banks: Sequence[ExpertBank], tiers: Sequence[str], settings: OffloadConfig, device: str = "cpu"
) -> list[Store]:
    """One store per layer; layers that share a file share the store. Closes what it opened if it cannot open all.

    Rows in RAM below a CUDA `device` are pinned, as far as the system allows.
    """
    with contextlib.ExitStack() as undo:
        stores: dict[int, Store] = {}
        absent = [bank for bank in banks if next(iter(bank.params.values())).is_meta]
        if absent:
            checkpoint = undo.enter_context(contextlib.closing(_checkpoint_store(model, banks)))
            stores |= {bank.index: checkpoint for bank in absent}
        loaded = [bank for bank in banks if bank.index not in stores and tiers[bank.index] == "disk"]
        if loaded:
            folder = Path(settings.offload_folder or tempfile.gettempdir())
            with bar("Spilling", sum(bank.nbytes for bank in loaded)) as shown:
                spilled = undo.enter_context(contextlib.closing(spill(banks, loaded, folder, shown.update)))
            stores |= {bank.index: spilled for bank in loaded}
        in_ram = [bank for bank in banks if tiers[bank.index] == "host"]
        if in_ram:
            rows = [torch.empty((0, bank.layout.row_bytes), dtype=torch.uint8) for bank in banks]
            with bar("Loading", sum(bank.nbytes for bank in in_ram), what="experts") as shown:
                for bank in in_ram:
                    rows[bank.index] = _rows_in_ram(bank, stores.get(bank.index), shown.update)
            if device == "cpu":
                host = HostStore(rows)
            else:
                held = {bank.index: rows[bank.index] for bank in in_ram}
                unpin = partial(pinned.unpin_layers, held, device)
                undo.callback(unpin)  # before the first is pinned: Ctrl-C may come between two
                host = HostStore(rows, pinned.pin_layers(held, device), unpin)
            stores |= {bank.index: host for bank in in_ram}
        if absent and checkpoint not in stores.values():
            checkpoint.close()  # every row of it has gone to RAM
        undo.pop_all()
        return [stores[bank.index] for bank in banks]


def _rows_in_ram(bank: ExpertBank, store: Store | None, progress: Callable[[int], object]) -> torch.Tensor:
    if store is None:
        rows = pack_rows(bank)
        progress(rows.nbytes)
        return rows
    rows = page_aligned(bank.nbytes).view(bank.num_experts, -1)
    for e in range(bank.num_experts):
        store.read(bank.index, e, memoryview(rows[e].numpy()))
        progress(rows[e].nbytes)
    return rows


def _checkpoint_store(model: nn.Module, banks: Sequence[ExpertBank]) -> DiskStore:
    folder = Path(getattr(model.config, "_name_or_path", "") or "")
    if not str(folder) or not folder.is_dir():
        raise CheckpointError(
            f"the experts of {type(model).__name__} are on the meta device, but its config names no local "
            f"checkpoint folder to "
            "read them from; use moe_offload.from_pretrained(path, budget)"
        )
    return DiskStore([bank.layout for bank in banks], index_checkpoint(model, banks, folder))
