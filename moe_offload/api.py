"""The story in one screen: find the experts, plan, choose where rows rest, patch the model, pre-warm.

optimize(model, budget)          a loaded model, or one whose experts are on "meta"
from_pretrained(path, budget)    a checkpoint whose experts never all come into RAM
make_plan(model_or_path, budget) how many slots would fit, before anything is loaded (more: plan/forecast.py)
record_profile(model, inputs)    which experts a workload uses (record.py)
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .checkpoint.loading import load_dense, resolve_folder, skeleton
from .checkpoint.packed import index_checkpoint
from .config.device_map import DeviceMap
from .config.settings import Config, OffloadConfig, resolve
from .config.sizes import format_size
from .errors import OffloadError
from .experts import MoELayer, find_experts
from .forward.advise import Advisor, at_start
from .handle import Handle
from .memory.devices import usable_kinds
from .memory.process_memory import bound_kernel_caches, trim_heap
from .memory.stores.open import open_stores
from .observe.profile import Profile
from .observe.profile_stats import most_wanted
from .observe.progress import bar
from .patch import install as patch
from .patch.dense_weights import keep_where_it_is, place_dense
from .patch.refusals import refuse_what_reaches_experts
from .patch.saving import save_real_rows
from .plan.arrange import Arrangement, arrange
from .plan.budget import Plan
from .plan.forecast import read_outline
from .plan.weights import fingerprint
from .runtime.assemble import build_runtime, on_device
from .runtime.model import Runtime
from .runtime.prewarm import prewarm_slots

logger = logging.getLogger("moe_offload")
Model = TypeVar("Model", bound=nn.Module)
MaxMemory = Mapping[str | int, str | int] | None


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
    """Let `model` run inside `budget` bytes; returns the same object: same class, same `generate`, same tokens.

    `budget` is everything the model may hold: dense weights, expert slots, KV cache and workspace. An int (bytes),
    "8GB" (decimal), "8GiB" (binary), "50%" of the memory now available, or "auto". Without one, `max_memory["cpu"]`
    counts, else "auto"; with both, layers of experts rest in RAM as far as what is between them has room. Other experts
    rest on disk (`device_map` may send them to "cpu"): in the checkpoint they came from if they are on the meta device,
    else in a spill file in `offload_folder`, written once and removed on close.
    `profile` fills the slots before the first token with what such a workload uses; interrupt it (Ctrl-C) and the
    model is offloaded all the same, only colder. What is not given as an argument is read from `config` (an
    `OffloadConfig`, a dict of its fields, or the path of a file), `MOE_OFFLOAD_*` and the default file
    (`config/settings.py`).

    Afterwards `save_pretrained` writes the ordinary checkpoint, a row at a time (`patch/saving.py`); `state_dict()`
    has to hold all experts in RAM. Adapters on dense layers work as ever. What would reach the experts (moving,
    converting, copying, loading, adapting them) raises `OffloadError` and says what to do instead
    (`patch/refusals.py`).

    Raises `UnsupportedModelError` naming a module that cannot be run exactly, `BudgetError` stating the floor,
    `ConfigError`, `CheckpointError` or `ProfileError`; the model is unchanged then. A row that cannot be read while the
    slots are filled raises, too, and the model is closed.
    """
    settings = _settings(config, budget, device_map, max_memory, profile, offload_folder)
    if hasattr(model, "moe_offload"):
        raise OffloadError(
            "this model was already offloaded (model.moe_offload is its handle); to offload it anew, load it again: "
            "its weights are in the cache's files"
        )
    moe_layers = find_experts(model)
    settings = keep_where_it_is(model, moe_layers, settings)
    arrangement = arrange(model, moe_layers, settings, usable=usable_kinds(settings.untested))
    prior = _load_profile(profile or settings.profile, model, moe_layers)
    device_decides = on_device(settings, moe_layers, arrangement.slots, arrangement.tiers, arrangement.device)
    bound_kernel_caches()
    place_dense(model, moe_layers, arrangement.device)
    stores = open_stores(model, moe_layers, arrangement.tiers, settings, arrangement.device)
    with contextlib.ExitStack() as undo:
        for store in set(stores):
            undo.callback(store.close)
        runtime = build_runtime(
            moe_layers, arrangement.plan, stores, settings, prior, arrangement.device, device_decides
        )
        undo.pop_all()
        undo.callback(runtime.close)
        handle = _install(model, runtime, arrangement, settings)
        undo.pop_all()
    model.moe_offload = handle  # type: ignore[assignment]
    logger.info("%s", handle)
    at_start(arrangement.plan, settings.budget)
    if settings.live:
        handle.serve_live()
    if settings.prewarm:
        try:
            _prewarm(runtime, prior)
        except OffloadError:
            handle.close()
            raise
    return model


def from_pretrained(
    path_or_id: str | Path,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    profile: Profile | str | Path | None = None,
    config: Config = None,
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint folder (or Hub repository) of the ordinary layout to run inside `budget`; see `optimize`.

    Returns the ordinary transformers class. Dense weights are loaded; experts are not: their rows are read from the
    original safetensors shards (or from packed ones, see `pack_checkpoint`) when a token asks for them. The budget,
    every shard and every expert are checked before anything is loaded. Further keyword arguments go to the class's own
    `from_pretrained`.
    """
    settings = _settings(config, budget, device_map, max_memory, profile)
    folder = resolve_folder(path_or_id, **{k: kwargs.pop(k) for k in ("revision", "token") if k in kwargs})
    meta = skeleton(folder, dtype)
    moe_layers = find_experts(meta)
    arrange(meta, moe_layers, settings, usable=usable_kinds(settings.untested))
    prior = _load_profile(profile or settings.profile, meta, moe_layers)
    index = index_checkpoint(meta, moe_layers, folder)
    for removed in ("offload_folder", "low_cpu_mem_usage", "offload_state_dict", "torch_dtype"):
        if kwargs.pop(removed, None) is not None:
            logger.info("%s is not needed: experts are read from the original shards", removed)
    model = load_dense(folder, meta, index.keys, **kwargs)
    trim_heap()  # for each of the loader's threads it keeps tens of MB
    return optimize(model, profile=prior, config=settings).eval()


def make_plan(
    model_or_path: nn.Module | str | Path,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    config: Config = None,
    dtype: str | torch.dtype = "auto",
) -> Plan:
    """What `budget` would hold of this model. A path is answered from its headers alone: no weight is read."""
    settings = _settings(config, budget, device_map, max_memory, None)
    found = read_outline(model_or_path, dtype)
    return arrange(found.model, found.moe_layers, settings).plan


def _settings(
    config: Config,
    budget: int | str | None,
    device_map: DeviceMap,
    max_memory: MaxMemory,
    profile: Profile | str | Path | None,
    offload_folder: str | Path | None = None,
) -> OffloadConfig:
    """The settings in force; an argument that is None was not given."""
    path = None if isinstance(profile, Profile) else profile
    given = {"budget": budget, "device_map": device_map, "max_memory": max_memory, "profile": path}
    given |= {"offload_folder": offload_folder}
    return resolve(config, **{name: value for name, value in given.items() if value is not None})


def _load_profile(
    profile: Profile | str | Path | None, model: nn.Module, moe_layers: Sequence[MoELayer]
) -> Profile | None:
    if profile is None:
        return None
    loaded = profile if isinstance(profile, Profile) else Profile.load(profile)
    loaded.check(fingerprint(model, moe_layers))
    return loaded


def _install(model: nn.Module, runtime: Runtime, arrangement: Arrangement, settings: OffloadConfig) -> Handle:
    print_of = fingerprint(model, [layer.moe for layer in runtime.layers])
    implementation = patch.choose_implementation(
        [layer.moe for layer in runtime.layers], settings.experts_implementation
    )
    if arrangement.device != "cpu":
        patch.serve_products(arrangement.device)
    inner = settings.compile if settings.compile != "auto" else "graph" if arrangement.device == "cpu" else "inductor"
    everywhere = len(runtime.device_layers) == len(runtime.layers)
    graphs = patch.install(
        model,
        runtime,
        implementation=implementation,
        inner=inner,
        overlap=_overlaps(settings, inner, runtime),
        guess=settings.lookahead,
        # On a GPU a step with a static KV cache has constant shapes, and must be traced so to become a CUDA graph; it
        # does where no layer needs the host.
        dynamic=None if settings.dynamic and arrangement.device != "cpu" and everywhere else settings.dynamic,
        fullgraph=settings.fullgraph,
        advisor=Advisor(runtime, arrangement.plan),
    )
    refuse_what_reaches_experts(model, runtime)
    save_real_rows(model, runtime)
    weakref.finalize(model, _release, runtime)
    return Handle(
        model,
        runtime,
        arrangement,
        print_of,
        compile=inner,
        implementation=implementation,
        graphs=graphs,
        on_close=lambda: _release(runtime),
    )


def _overlaps(settings: OffloadConfig, inner: str, runtime: Runtime) -> bool:
    if runtime.device_caches is not None:
        return False
    return inner == "graph" if settings.overlap is None else settings.overlap


def _release(runtime: Runtime) -> None:
    with runtime.alone():
        if not runtime.closed:
            try:
                patch.uninstall(runtime)
            finally:
                runtime.close()


def _prewarm(runtime: Runtime, prior: Profile | None) -> None:
    """Fill the slots with what the profile expects. Without one there is nothing to go by: the first tokens decide."""
    if prior is None:
        return
    wanted = most_wanted(prior, [layer.cache.slots for layer in runtime.layers])
    size = sum(runtime.layers[layer].moe.layout.row_bytes for layer, _ in wanted)
    with bar("Pre-warming", len(wanted), unit="row", what=format_size(size)) as shown:
        prewarm_slots(runtime, wanted, shown.update)
