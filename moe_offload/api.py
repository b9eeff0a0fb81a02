"""`optimize` and `from_pretrained`: find the experts, plan, choose where rows rest, patch the model, pre-warm.

optimize(model, budget)         a loaded model, or one whose experts are on "meta"
from_pretrained(path, budget)   a checkpoint whose experts never all come into RAM
Before them: plan/forecast.py (what a budget would hold), record.py, pack.py. After them: handle/, `model.moe_offload`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .checkpoint.outline import Outline, outline_folder
from .checkpoint.pretrained.arguments import sort_arguments
from .checkpoint.pretrained.dense import find_adapter, load_adapter, load_dense
from .checkpoint.pretrained.download import get_folder
from .checkpoint.quantised.fused_weight import fuse_weights
from .checkpoint.quantised.verify import verify_unpacking
from .checkpoint.row_index import RowIndex
from .config.device_map import DeviceMap, MaxMemory
from .config.settings import Config
from .errors import OffloadError
from .experts import MoELayer, find_experts
from .forward.advise import advise_at_start, say_what_is_remembered
from .forward.tested_versions import warn_of_untested_versions
from .memory.process_memory import bound_kernel_caches, trim_heap
from .memory.stores.open import index_absent, open_stores, read_first
from .observe.profile import Profile
from .patch.attach import attach_runtime
from .patch.dense_weights import find_dense_device, place_dense
from .plan.prepare import Prepared, prepare_model, settings_of
from .ranks.call import exchanging
from .ranks.group import Group
from .ranks.join import agreed, form_ranks, join_ranks, or_end_for_all, split_over, told_to_ranks
from .runtime.assemble import build_runtime, on_device
from .runtime.prewarm import prewarm_from, prewarm_when_idle

logger = logging.getLogger("moe_offload")
Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    profile: Profile | str | Path | None = None,
    offload_folder: str | Path | None = None,
    config: Config = None,
) -> Model:
    """Let a loaded `model` run inside `budget` bytes: the same object and class, the same `generate`, the same tokens.

    Afterwards `save_pretrained` writes the ordinary checkpoint, and adapters on dense layers work as ever. What would
    reach the experts (moving, converting, copying or training them) raises `OffloadError`, which says what to do.

    Args:
        model: A transformers model with routed experts. Experts on the meta device are read from the checkpoint that
            `model.config` names; others rest in RAM, or in a spill file that is written once and removed on close.
        budget: Everything the model may hold on its device: dense weights, expert slots, KV cache, workspace. Bytes,
            "8GB" (decimal), "8GiB" or "8g" (binary), "50%" of what is available, or "auto" (90 %). None: what
            `max_memory` says, else "auto".
        device_map: Where layers compute and rows rest, in accelerate's grammar: {"model.layers.*.mlp.experts": "cpu"}.
        max_memory: Bytes or sizes by device: {"cpu": "60GiB"}. With a budget too, rows rest in RAM in what is between.
        profile: A `Profile` or its path: fills the slots before the first token. Ctrl-C leaves the model colder.
            "auto" (None: the default): usage that earlier runs have left, and this one adds to; slots are filled from
            it while nothing else runs. "auto:italian" or "italian": the same for a workload of that name. "off".
        offload_folder: Where the spill file is written; None: the system's folder for temporary files.
        config: All other settings: an `OffloadConfig`, a dict of its fields, or a configuration file.

    Returns:
        `model` itself; `model.moe_offload` is its `Handle`.

    Raises:
        UnsupportedModelError: A module, which is named, cannot be run exactly.
        BudgetError: The budget is below the floor, which is stated.
        ConfigError: A setting means nothing.
        CheckpointError: The experts' files are damaged, missing, or of another model.
        ProfileError: The profile is damaged, or of another model.
        ExpertReadError: A row cannot be read while the slots are filled; the model is closed then. After all other
            errors it is unchanged.

    Example:

        ```python
        model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")
        model = moe_offload.optimize(model, "8GB")
        ```
    """
    with told_to_ranks(getattr(getattr(model, "config", None), "distributed_config", None)):
        settings = settings_of(
            config,
            budget=budget,
            device_map=device_map,
            max_memory=max_memory,
            profile=profile,
            offload_folder=offload_folder,
        )
        if hasattr(model, "moe_offload"):
            raise OffloadError(
                "this model was already offloaded (model.moe_offload is its handle); to offload it anew, load it "
                "again: its weights are in the cache's files"
            )
        moe_layers, index = index_absent(model, find_experts(model))
        device = find_dense_device(model, moe_layers, settings.untested)
    group = join_ranks(model, moe_layers, settings, device)
    with agreed(group):
        prepared = prepare_model(model, moe_layers, settings, profile, found_on=device)
    with or_end_for_all(group):
        return _offload(model, moe_layers, prepared, index, group=group)


def from_pretrained(
    path_or_id: str | Path,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    profile: Profile | str | Path | None = None,
    config: Config = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint to run inside `budget` bytes; its experts never all come into RAM.

    Class, weights, dtype and generation defaults are those that plain transformers would give. Dense weights are
    loaded; the experts' rows are read from the original safetensors files when a token asks for them. Everything is
    planned and checked before anything is loaded.

    Args:
        path_or_id: The folder of a checkpoint (ordinary, or packed by `pack_checkpoint`), or a repository on the Hub.
        budget: Everything the model may hold on its device, as in `optimize`: bytes, "8GB", "8GiB", "50%", "auto".
        device_map: As in `optimize`.
        max_memory: As in `optimize`.
        profile: As in `optimize`.
        config: Settings of moe_offload, as in `optimize`. Fields of the model's own configuration are `kwargs`.
        dtype: "auto", a torch.dtype or its name, as in transformers. None: "auto".
        **kwargs: Whatever transformers' from_pretrained takes: `revision`, `token`, `subfolder`, `variant`,
            `attn_implementation`, `generation_config` ..., and fields of the model's configuration. Each is honoured,
            or refused by name (`checkpoint/pretrained/arguments.py`).

    Returns:
        The model, of its ordinary transformers class, in eval mode; `model.moe_offload` is its `Handle`.

    Raises:
        ConfigError: An argument means nothing, or is not supported here.
        CheckpointError: There is no checkpoint, or it is damaged, incomplete, or of another model.
        UnsupportedModelError: The model cannot be run exactly: quantised experts, code of its own, no experts.
        BudgetError: The budget is below the floor, which is stated.
        ProfileError: The profile is damaged, or of another model.

    Example:

        ```python
        model = moe_offload.from_pretrained("Qwen/Qwen3-30B-A3B", budget="8GB")
        model.generate(**inputs, max_new_tokens=2)
        ```
    """
    with told_to_ranks(kwargs.get("distributed_config")):
        said = sort_arguments(dtype, kwargs)
        settings = settings_of(
            config,
            budget=budget,
            device_map=device_map,
            max_memory=max_memory,
            profile=profile,
            experts_implementation=said.experts_implementation,
        )
    group = form_ranks(said.model.get("distributed_config"), settings)
    with agreed(group):
        folder = get_folder(path_or_id, said)
        found = outline_folder(folder, said)
    found = split_over(group, found, said.model.get("distributed_config"), settings)
    with agreed(group):
        prepared = prepare_model(found.model, found.moe_layers, settings, profile, path_or_id)
    with exchanging(group):
        model: nn.Module = load_dense(found, said, path_or_id)
        trim_heap()  # for each of the loader's threads it keeps tens of MB
        moe_layers = found.pack(find_experts(model))
        find_dense_device(model, moe_layers, settings.untested)  # raises where transformers put it elsewhere
        prepared.check_rows(moe_layers)
        model = _offload(model, moe_layers, prepared, found.index, found, group)
    if (adapter := find_adapter(folder, said.subfolder)) is not None:
        with _closed_on_error(model):
            load_adapter(model, adapter, said)
    return model


def _offload(
    model: Model,
    moe_layers: Sequence[MoELayer],
    prepared: Prepared,
    index: RowIndex | None,
    found: Outline | None = None,
    group: Group | None = None,
) -> Model:
    """Do what was prepared. `index` says where the rows of experts on the meta device lie, `found` which files the
    model was loaded from; `group` are the ranks that share them, if there are several."""
    settings, arrangement, profile = prepared.settings, prepared.arrangement, prepared.profile
    tiers, device = arrangement.tiers, arrangement.device
    device_decides = on_device(settings, moe_layers, arrangement.slots, tiers, device)
    bound_kernel_caches(arrangement.plan.budget_bytes)
    place_dense(model, moe_layers, device)
    stores = open_stores(moe_layers, tiers, settings, device, index)
    with contextlib.ExitStack() as undo:
        for store in set(stores):
            undo.callback(store.close)
        if index is not None:
            moe_layers = verify_unpacking(moe_layers, index.packings, model, partial(read_first, stores))
            moe_layers = fuse_weights(moe_layers) if settings.compute == "packed" else moe_layers
        runtime = build_runtime(
            moe_layers, arrangement.plan, stores, settings, profile, device, device_decides, prepared.lock_bytes
        )
        undo.pop_all()
        undo.callback(runtime.close)
        handle = attach_runtime(model, runtime, prepared, found, group)
        undo.pop_all()
    model.moe_offload = handle  # type: ignore[assignment]
    logger.info("%s", handle)
    advise_at_start(arrangement.plan, settings.budget)
    warn_of_untested_versions()
    if settings.live:
        handle.serve_live()
    if prepared.usage is not None:
        handle._begin_remembering(prepared.usage, profile)
        say_what_is_remembered(prepared.usage.path, profile)
    if settings.prewarm and profile is not None:
        if prepared.usage is None:
            with _closed_on_error(model):
                prewarm_from(runtime, profile)
        else:
            prewarm_when_idle(runtime, profile)
    return model


@contextlib.contextmanager
def _closed_on_error(model: nn.Module) -> Iterator[None]:
    """Ctrl-C leaves the model offloaded, only colder; an error closes it."""
    try:
        yield
    except Exception:
        model.moe_offload.close()  # type: ignore[operator, union-attr]
        raise
