"""Put a runtime under a model: patched, refusing what would reach its experts, and saved as it was; taken off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from ..checkpoint.outline import Outline
from ..config.settings import OffloadConfig
from ..experts import MoELayer
from ..forward.advise import Advisor
from ..handle import Handle
from ..plan.prefill import PrefillRoom, prefill_room
from ..plan.prepare import Prepared
from ..ranks.call import RankCall
from ..ranks.group import Group
from ..runtime.model import Runtime
from . import install as patch
from .exact_products import rows_are_alike, serve_exact, sharpen_linears
from .fast_products import FEW_TOKENS, restore_linears, serve_fast, speed_up_linears
from .refusals import refuse_what_reaches_experts
from .saving.original import Original
from .saving.saver import save_real_rows
from .saving.split import refuse_saving


def attach_runtime(
    model: Any, runtime: Runtime, prepared: Prepared, found: Outline | None = None, group: Group | None = None
) -> Handle:
    """Let `model` run on `runtime` from now on. Returns the handle, whose `close` takes the runtime off again.

    `found` is what the model was loaded from, where it came from files; `group` are the ranks that share its experts.
    """
    settings, arrangement = prepared.settings, prepared.arrangement
    wanted = settings.experts_implementation
    if settings.compute == "fast" and wanted == "auto":
        wanted = "grouped_mm"  # the one that has fast products
    moe_layers = [layer.moe for layer in runtime.layers]
    implementation = patch.choose_implementation(moe_layers, wanted, arrangement.device)
    fast = settings.compute == "fast" and serve_fast(arrangement.device, implementation)
    exact = arrangement.device == "cpu" and settings.compute == "exact"
    if exact:
        serve_exact([layer.moe for layer in runtime.layers])
        for layer in runtime.layers:
            layer.joint.shares_products = partial(_shares_products, layer.moe, implementation)
    if arrangement.device != "cpu":
        patch.serve_products(arrangement.device)
    inner = _inner_compiler(settings, arrangement.device)
    room = _room_of_all(prefill_room(model, moe_layers, arrangement.plan), group)
    graphs = patch.patch_model(
        model,
        runtime,
        implementation=implementation,
        inner=inner,
        overlap=_overlaps(settings, inner, runtime),
        guess=settings.lookahead,
        dynamic=_choose_dynamic(settings, arrangement.device, runtime),
        fullgraph=settings.fullgraph,
        few_tokens=FEW_TOKENS if fast else 0,
        advisor=Advisor(runtime, arrangement.plan),
        room=room,
        static_tokens=settings.kv_tokens if inner == "inductor" and _all_on_gpu(arrangement.device, runtime) else None,
    )
    refuse_what_reaches_experts(model, runtime)
    if group is None:
        save_real_rows(model, runtime, Original.of(found))
    else:
        model._compiled_call_impl = RankCall(model._compiled_call_impl, group)
        refuse_saving(model)
    linears = speed_up_linears(model) if fast else sharpen_linears(model) if exact else []
    weakref.finalize(model, runtime.when_idle, lambda: _detach_runtime(runtime))
    return Handle(
        model,
        runtime,
        arrangement,
        prepared.fingerprint,
        compile=inner,
        implementation="called" if all(moe.called for moe in moe_layers) else implementation,
        graphs=graphs,
        room=room,
        ranks=group,
        on_close=lambda: runtime.when_idle(lambda: _detach_runtime(runtime, linears)),
    )


def _shares_products(moe: MoELayer, implementation: str, calls: int) -> bool:
    """Whether so many calls may be computed as one by these experts, with the bits of each alone."""
    return moe.form == "interface" and implementation == "grouped_mm" and rows_are_alike(moe, calls)


def _detach_runtime(runtime: Runtime, linears: Iterable[nn.Linear] = ()) -> None:
    restore_linears(linears)
    if not runtime.closed:
        try:
            patch.unpatch_model(runtime)
        finally:
            runtime.close()


def _inner_compiler(settings: OffloadConfig, device: str) -> str:
    if settings.compile != "auto":
        return settings.compile
    return "graph" if device == "cpu" else "inductor"


def _room_of_all(own: PrefillRoom, group: Group | None) -> PrefillRoom:
    """Ranks read a prompt in the same pieces: those of the one that has the least room."""
    if group is None:
        return own
    told = [PrefillRoom(**one) for one in group.exchange("room", asdict(own), "start")]
    return min(told, key=lambda one: one.room_bytes)


def _overlaps(settings: OffloadConfig, inner: str, runtime: Runtime) -> bool:
    """Whether decode computes resident experts while missing ones load: not where the device decides by itself."""
    if runtime.device_caches is not None:
        return False
    return inner == "graph" if settings.overlap is None else settings.overlap


def _choose_dynamic(settings: OffloadConfig, device: str, runtime: Runtime) -> bool | None:
    """On a GPU a step with a static KV cache has constant shapes, and must be traced so to become a CUDA graph; it
    does where no layer needs the host."""
    return None if settings.dynamic and _all_on_gpu(device, runtime) else settings.dynamic


def _all_on_gpu(device: str, runtime: Runtime) -> bool:
    """Whether decode steps can be CUDA graphs: a GPU decides for all layers."""
    return device != "cpu" and len(runtime.device_layers) == len(runtime.layers)
