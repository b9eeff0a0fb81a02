"""Put the parts of a runtime together: a cache, slots and a policy for each layer; scratch, threads and a lock for all.

Here it is settled who decides which expert gives way while decoding, the host or the device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import unfilled
from .config import OffloadConfig
from .errors import BudgetError, ConfigError
from .experts import ExpertBank
from .kernels import KERNELS, pinned
from .layer_runtime import LayerRuntime
from .plan import Plan
from .policies import POLICIES
from .profile import Profile
from .profile_stats import rates
from .runtime import Runtime
from .scratch import Scratch
from .sizes import format_size
from .stores import Store
from .stores.host import HostStore
from .transfer import TRANSFERS

logger = logging.getLogger("moe_offload")
DEVICE_POLICY = "decayed_lfu"  # what the kernels know
DEFAULT_POLICY = OffloadConfig().policy


def on_device(settings: OffloadConfig, tiers: Sequence[str], device: str) -> bool:
    """Whether the device decides. Raises `ConfigError` where it is asked to and cannot."""
    if settings.decide != "device":
        return settings.decide == "auto" and device != "cpu" and _obstacle(settings, tiers) is None
    obstacle = _obstacle(settings, tiers)
    if obstacle is not None:
        raise ConfigError(f"decide='device' is not possible here: {obstacle}")
    return True


def _obstacle(settings: OffloadConfig, tiers: Sequence[str]) -> str | None:
    if "disk" in tiers:
        return (
            f"the rows of {list(tiers).count('disk')} of {len(tiers)} layers rest on disk, which no device can read by "
            "itself; device_map='cpu' (and max_memory) lets them rest in RAM"
        )
    if settings.policy not in (DEVICE_POLICY, DEFAULT_POLICY):
        return f"the device knows the policy {DEVICE_POLICY!r}, not {settings.policy!r}"
    if settings.lookahead:
        return "lookahead loads what the host has read off a router; switch one of the two off"
    return None


def build_runtime(
    banks: Sequence[ExpertBank],
    plan: Plan,
    stores: Sequence[Store],
    settings: OffloadConfig,
    prior: Profile | None,
    device: str,
    device_decides: bool,
) -> Runtime:
    """One `LayerRuntime` for each bank, in their order, that computes on `device`.

    Raises `BudgetError` where the device has no memory for what was planned.
    """
    try:
        return _build(banks, plan, stores, settings, prior, device, device_decides)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{device} has no room for {format_size(plan.bank_bytes)} of expert slots and "
            f"{format_size(plan.costs.scratch_bytes)} of scratch, within a budget of {format_size(plan.budget_bytes)}: "
            "something else holds its memory. Make room, or use a smaller budget."
        ) from error


def _build(
    banks: Sequence[ExpertBank],
    plan: Plan,
    stores: Sequence[Store],
    settings: OffloadConfig,
    prior: Profile | None,
    device: str,
    device_decides: bool,
) -> Runtime:
    transfer, lock = TRANSFERS[device.partition(":")[0]](device), threading.RLock()
    scratch = Scratch(unfilled(plan.costs.scratch_bytes, device), transfer, settings.poison)
    layers = []
    for bank, slots, store in zip(banks, plan.slots, stores, strict=True):
        name = DEVICE_POLICY if device_decides else settings.policy
        policy = POLICIES[name](bank.num_experts, settings.half_life)
        if prior is not None and prior.tokens:
            policy.seed(rates(prior, bank.index))
        layers.append(
            LayerRuntime(
                bank,
                slots=slots,
                policy=policy,
                store=store,
                transfer=transfer,
                scratch=scratch,
                lock=lock,
                poison=settings.poison,
            )
        )
    runtime = Runtime(layers, list({id(store): store for store in stores}.values()), transfer, lock)
    if device_decides and (device == "cpu" or all(isinstance(store, HostStore) and store.pinned for store in stores)):
        kernels = KERNELS[device.partition(":")[0]]()
        rows = [_rows_of(bank, store, device) for bank, store in zip(banks, stores, strict=True)]
        runtime.decide_on_device(rows, settings.half_life, kernels)
        logger.info("the device decides which experts are in the slots, by %s", DEVICE_POLICY)
    return runtime


def _rows_of(bank: ExpertBank, store: Store, device: str) -> Tensor:
    """The rows of a layer as `device` sees them."""
    if not isinstance(store, HostStore):
        raise AssertionError(f"{bank.name}: its rows are in {type(store).__name__}")
    rows_EN = store.rows_EN(bank.index)
    return (rows_EN if device == "cpu" else pinned.device_view(rows_EN, device)).view(bank.layout.dtype)
