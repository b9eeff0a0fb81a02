"""Put the parts of a runtime together: a cache, slots and a policy for each layer; scratch, threads and a lock for all.

Here it is settled who decides which expert gives way while decoding, layer by layer: the device where it can read the
rows, that is, where they rest in RAM (pinned, for a GPU), and where all of them have slots; else the host.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..cache import POLICIES
from ..config.settings import OffloadConfig
from ..config.sizes import format_size
from ..errors import BudgetError, ConfigError
from ..experts import MoELayer
from ..memory.buffers import allocate_unfilled
from ..memory.locking import MemoryLock
from ..memory.scratch import Scratch
from ..memory.stores import Store
from ..memory.stores.host import HostStore
from ..memory.transfer import TRANSFERS, pinned
from ..memory.transfer.fork import FORKS
from ..observe.profile import Profile
from ..observe.profile_stats import uses_per_token
from ..plan.budget import Plan
from .ahead.on_device import DeviceGuesses
from .in_flight import Arrivals
from .kernels import KERNELS
from .kernels.staging import STAGERS
from .layer import LayerRuntime
from .lock import ModelLock
from .model import Runtime

logger = logging.getLogger("moe_offload")
DEVICE_POLICY = "decayed_lfu"  # the one policy that the kernels have
DEFAULT_POLICY = OffloadConfig().policy


def on_device(
    settings: OffloadConfig, moe_layers: Sequence[MoELayer], slots: Sequence[int], tiers: Sequence[str], device: str
) -> list[bool]:
    """For which layers the device is to decide. Raises `ConfigError` where it is asked to and cannot for any."""
    obstacle = _obstacle(settings, moe_layers)
    asked = settings.decide == "device"
    if asked and obstacle is not None:
        raise ConfigError(f"decide='device' is not possible here: {obstacle}")
    if not asked and (settings.decide == "host" or device == "cpu" or obstacle is not None):
        return [False] * len(tiers)
    able = [tier == "host" or n == moe.num_experts for moe, n, tier in zip(moe_layers, slots, tiers, strict=True)]
    if not all(able):
        logger.log(
            logging.WARNING if asked else logging.INFO,
            "the host decides which experts are in the slots of %d of %d layers: their rows rest on disk, which no "
            "device can read by itself; device_map='cpu' (and max_memory) lets them rest in RAM",
            able.count(False), len(able),
        )  # fmt: skip
    return able


def _obstacle(settings: OffloadConfig, moe_layers: Sequence[MoELayer]) -> str | None:
    called = next((moe.name for moe in moe_layers if moe.called), None)
    if called is not None:
        return f"the model's own code calls the experts of {called} one by one, and Python decides which"
    if settings.policy not in (DEVICE_POLICY, DEFAULT_POLICY):
        return f"the device knows the policy {DEVICE_POLICY!r}, not {settings.policy!r}"
    return None


def build_runtime(
    moe_layers: Sequence[MoELayer],
    plan: Plan,
    stores: Sequence[Store],
    settings: OffloadConfig,
    profile: Profile | None,
    device: str,
    device_decides: Sequence[bool],
    lock_bytes: int = 0,
) -> Runtime:
    """One `LayerRuntime` for each MoE layer, in their order, that computes on `device`.

    `device_decides[l]`: whether the device is to decide for layer l; it will, unless its rows could not be pinned.
    `lock_bytes` of slots and scratch are locked in memory.
    Raises `BudgetError` where the device has no memory for what was planned, `ConfigError` where the system refuses to
    lock what was asked to be.
    """
    with _or_budget_error(plan, device):
        transfer, lock = TRANSFERS[device.partition(":")[0]](device), ModelLock()
        scratch = Scratch(allocate_unfilled(plan.costs.scratch_bytes, device), transfer, settings.poison)
        locked = MemoryLock(lock_bytes)
        locked.lock(scratch.raw)
        device_decides = _whose_weights_can_be_read(moe_layers, device_decides)
        rows_EN = readable_rows(moe_layers, plan.slots, stores, device_decides, device)
        layers = []
        for moe, slots, store in zip(moe_layers, plan.slots, stores, strict=True):
            name = DEVICE_POLICY if moe.index in rows_EN else settings.policy
            policy = POLICIES[name](moe.num_experts, settings.half_life)
            if profile is not None and profile.tokens:
                policy.seed(uses_per_token(profile, moe.index))
            layers.append(
                LayerRuntime(
                    moe,
                    slots=slots,
                    policy=policy,
                    store=store,
                    transfer=transfer,
                    scratch=scratch,
                    lock=lock,
                    poison=settings.poison,
                    locked=locked,
                    # What is handed back the next layer has to fault in again: 0.5 of the 1.8 s of a prompt, measured.
                    trims_heap=moe is moe_layers[-1] or not plan.costs.heap_bytes(plan.budget_bytes),
                )
            )
        if settings.lock_memory is True:
            locked.check(lock_bytes)
        runtime = Runtime(layers, list({id(store): store for store in stores}.values()), transfer, lock)
        if rows_EN:
            kind = device.partition(":")[0]
            guess = partial(_read_ahead, device=torch.device(device)) if settings.lookahead else None
            runtime.decide_on_device(rows_EN, settings.half_life, KERNELS[kind](), guess)
            logger.info(
                "the device decides which experts are in the slots of %d of %d layers, by %s",
                len(rows_EN), len(layers), DEVICE_POLICY,
            )  # fmt: skip
        return runtime


def _read_ahead(layers: Sequence[Arrivals], device: torch.device) -> DeviceGuesses:
    return DeviceGuesses(layers, STAGERS[device.type](), FORKS[device.type](device))


@contextlib.contextmanager
def _or_budget_error(plan: Plan, device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{device} has no room for {format_size(plan.bank_bytes)} of expert slots and "
            f"{format_size(plan.costs.scratch_bytes)} of scratch, within a budget of {format_size(plan.budget_bytes)}: "
            "something else holds its memory. Make room, or use a smaller budget"
        ) from error


def _whose_weights_can_be_read(moe_layers: Sequence[MoELayer], wanted: Sequence[bool]) -> list[bool]:
    """The `wanted` layers whose weights a device's kernels can read, if they lie packed in their rows."""
    able = [all(weight.row_codes(True) or weight.row_codes(False) for weight in moe.packed) for moe in moe_layers]
    left = [moe for moe, can, wants in zip(moe_layers, able, wanted, strict=True) if wants and not can]
    if left:
        logger.warning(
            "the host decides which experts are in the slots of %d of %d layers, such as %s: their quantised weights "
            "(%s) do not lie in their rows as the kernels of a device read them, and are unpacked one by one",
            len(left), len(able), left[0].name, left[0].packed[0].format,
        )  # fmt: skip
    return [wants and can for wants, can in zip(wanted, able, strict=True)]


def readable_rows(
    moe_layers: Sequence[MoELayer], slots: Sequence[int], stores: Sequence[Store], wanted: Sequence[bool], device: str
) -> dict[int, Tensor | None]:
    """`{layer: rows}` of the `wanted` layers whose rows the device can read; None if all its experts have slots."""
    found: dict[int, Tensor | None] = {}
    for moe, n, store, wants in zip(moe_layers, slots, stores, wanted, strict=True):
        if wants and isinstance(store, HostStore) and (device == "cpu" or moe.index in store.pinned):
            found[moe.index] = _rows_of(moe, store, device)
        elif wants and n == moe.num_experts:
            found[moe.index] = None
    return found


def _rows_of(moe: MoELayer, store: HostStore, device: str) -> Tensor:
    """The rows of a layer as `device` sees them."""
    rows_EN = store.rows_EN(moe.index)
    return (rows_EN if device == "cpu" else pinned.device_view(rows_EN, device)).view(moe.layout.dtype)
