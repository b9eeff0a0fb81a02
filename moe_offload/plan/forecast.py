"""What a budget would give, before anything is loaded: slots, hit rate, KV cache, the floor, and what more would buy.

`make_plan` answers with the slots alone, `forecast` with all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.outline import Outline, outline_checkpoint
from ..checkpoint.pretrained.arguments import Arguments
from ..config.device_map import DeviceMap, MaxMemory
from ..config.settings import Config, OffloadConfig
from ..config.sizes import format_size
from ..errors import OffloadError
from ..experts import MoELayer, find_experts
from ..observe.profile import Profile
from .arrange import Arrangement, arrange_layers
from .budget import Plan, budget_for, floor_budget
from .expected_hits import HitRate, covered_hit_rate, typical_hit_rate
from .explain import explain_arrangement
from .prepare import load_profile, settings_of
from .shares import profile_of_share
from .weights import kv_bytes, layer_shapes, longest_context, sum_costs, take_fingerprint


@dataclass(frozen=True)
class Forecast:
    """`print` it. Sizes are bytes; `floor_bytes` and `resident_bytes` are budgets on one device: the smallest that
    works, and the smallest that holds every expert.

    `hit_rate` is an estimate and says of what; `largest_context` is how many tokens of KV cache fit when each layer
    keeps no more than K slots (None where several devices share the model).
    """

    name: str
    source: str
    model: nn.Module
    moe_layers: list[MoELayer]
    arrangement: Arrangement
    hit_rate: HitRate
    context: int
    asked_context: int
    kv_bytes: int
    floor_bytes: int
    resident_bytes: int
    largest_context: int | None

    @property
    def plans(self) -> dict[str, Plan]:
        return self.arrangement.plans

    def explain(self) -> str:
        """Which rule puts what where, and what is not offloaded and why."""
        return explain_arrangement(self.model, self.moe_layers, self.arrangement)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. `budget`, `floor`, `slots` and so on are of the first device; `devices` has them all."""
        devices = {
            device: {
                "budget": plan.budget_bytes,
                "floor": plan.floor_bytes,
                "residency": plan.residency,
                "bytes": plan.parts(),
            }
            for device, plan in self.plans.items()
        }
        return {
            "model": self.name,
            "source": self.source,
            **next(iter(devices.values())),
            "slots": list(self.arrangement.slots),
            "tiers": self.arrangement.tiers,
            "experts": [moe.num_experts for moe in self.moe_layers],
            "row_bytes": max(moe.layout.row_bytes for moe in self.moe_layers),
            "hit_rate": {**vars(self.hit_rate)},
            "context": {"tokens": self.context, "kv_bytes": self.kv_bytes, "largest": self.largest_context},
            "resident": self.resident_bytes,
            "devices": devices,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}: sizes from {self.source}"]
        for device, plan in self.plans.items():
            lines += [*([f"{device}:"] if len(self.plans) > 1 else []), str(plan)]
        lines.append(f"hit rate to expect: {self.hit_rate}")
        room = f"; at most {self.largest_context} tokens fit" if self.largest_context is not None else ""
        beyond = (
            f" (the model takes no more; asked for {self.asked_context})" if self.asked_context > self.context else ""
        )
        lines.append(f"KV cache at {self.context} tokens{beyond}: {format_size(self.kv_bytes)}{room}")
        lines.append(f"every expert resident from a budget of {format_size(self.resident_bytes)}")
        return "\n".join(lines)


def forecast(
    model_or_path: nn.Module | str | Path,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    profile: Profile | str | Path | None = None,
    context: int | None = None,
    config: Config = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    code_revision: str | None = None,
) -> Forecast:
    """What a budget would give before anything is loaded: slots, hit rate, KV cache, the floor.

    Args:
        model_or_path: A model, the folder of a checkpoint, or a repository on the Hub (answered from headers).
        budget: As in `optimize`.
        device_map: As in `optimize`; devices need not be there: what would run on cuda:0 is planned, too.
        max_memory: As in `optimize`.
        profile: A `Profile` or its path, to predict the hit rate from. Remembered usage is not looked at.
        context: Tokens of KV cache to make room for; None: the setting `kv_tokens`.
        config: As in `optimize`.
        dtype: The dtype that a checkpoint would be loaded in.
        trust_remote_code: Whether code that comes with the checkpoint may run, as in transformers.
        code_revision: Of that code, where it lies in another repository.

    Returns:
        A `Forecast`: `print` it. Its sizes are bytes.

    Raises:
        BudgetError: The budget is below the floor, which is stated.
        ConfigError: A setting means nothing.
        CheckpointError: There is no checkpoint, or its headers do not fit its configuration.
        UnsupportedModelError: The model cannot be run exactly.
        ProfileError: The profile is damaged, or of another model.

    Example:

        ```python
        print(moe_offload.forecast("Qwen/Qwen3-30B-A3B", "8GB"))
        ```
    """
    settings = settings_of(
        config, budget=budget, device_map=device_map, max_memory=max_memory, profile=profile, kv_tokens=context
    )
    found = read_outline(model_or_path, dtype, trust_remote_code, code_revision)
    return of_outline(found, settings, profile if isinstance(profile, Profile) else None)


def make_plan(
    model_or_path: nn.Module | str | Path,
    budget: int | str | None = None,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    config: Config = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    code_revision: str | None = None,
) -> Plan:
    """What `budget` would hold of this model. Of a path only headers are read, no weight.

    Args:
        model_or_path: A model, the folder of a checkpoint, or a repository on the Hub.
        budget: As in `optimize`.
        device_map: As in `optimize`; devices need not be there.
        max_memory: As in `optimize`.
        config: As in `optimize`.
        dtype: The dtype that a checkpoint would be loaded in.
        trust_remote_code: Whether code that comes with the checkpoint may run, as in transformers.
        code_revision: Of that code, where it lies in another repository.

    Returns:
        The `Plan`: bytes of each part of the budget, and `slots[l]`, the experts of MoE layer l that stay resident.

    Raises:
        BudgetError: The budget is below the floor, which is stated.
        ConfigError: A setting means nothing, or the model is spread over several devices (ask `forecast`).
        CheckpointError: There is no checkpoint, or its headers do not fit its configuration.
        UnsupportedModelError: The model cannot be run exactly.

    Example:

        ```python
        print(moe_offload.make_plan("Qwen/Qwen3-30B-A3B", "8GB"))
        ```
    """
    settings = settings_of(config, budget=budget, device_map=device_map, max_memory=max_memory)
    found = read_outline(model_or_path, dtype, trust_remote_code, code_revision)
    return arrange_layers(found.model, found.moe_layers, settings).plan


def read_outline(
    model_or_path: nn.Module | str | Path,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    code_revision: str | None = None,
) -> Outline:
    if not isinstance(model_or_path, nn.Module):
        said = Arguments(dtype=dtype, trust_remote_code=trust_remote_code, code_revision=code_revision)
        return outline_checkpoint(model_or_path, said)
    if hasattr(model_or_path, "moe_offload"):
        raise OffloadError("this model is already offloaded; its plan is model.moe_offload.plan")
    model: Any = model_or_path
    return Outline(model, find_experts(model), "the model's own shapes")


def of_outline(found: Outline, settings: OffloadConfig, profile: Profile | None = None) -> Forecast:
    """As `forecast`, of an outline that was read before."""
    model, moe_layers = found.model, found.moe_layers
    arrangement = arrange_layers(model, moe_layers, settings)
    loaded = load_profile(profile, settings, take_fingerprint(model, moe_layers))
    loaded = loaded and profile_of_share(loaded, moe_layers)
    shapes, whole = layer_shapes(moe_layers), sum_costs(model, moe_layers, settings, next(iter(arrangement.plans)))
    experts = [moe.num_experts for moe in moe_layers]
    return Forecast(
        name=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        source=found.source,
        model=model,
        moe_layers=moe_layers,
        arrangement=arrangement,
        hit_rate=typical_hit_rate(arrangement.slots, experts)
        if loaded is None
        else covered_hit_rate(arrangement.slots, loaded),
        context=min(settings.kv_tokens, longest_context(model) or settings.kv_tokens),
        asked_context=settings.kv_tokens,
        kv_bytes=kv_bytes(model, settings.kv_tokens, settings.kv_sequences),
        floor_bytes=floor_budget(shapes, whole),
        resident_bytes=budget_for(1.0, shapes, whole),
        largest_context=_largest_context(found, settings, arrangement) if len(arrangement.plans) == 1 else None,
    )


def _largest_context(found: Outline, settings: OffloadConfig, arrangement: Arrangement) -> int:
    """The most tokens of KV cache with which the floor is within the budget; at least those that were planned for."""
    shapes, whole = (
        layer_shapes(found.moe_layers),
        sum_costs(found.model, found.moe_layers, settings, arrangement.device),
    )
    longest = longest_context(found.model) or 2**20
    low, high = min(settings.kv_tokens, longest), longest
    while low < high:
        middle = (low + high + 1) // 2
        fits = (
            floor_budget(shapes, replace(whole, kv_bytes=kv_bytes(found.model, middle, settings.kv_sequences)))
            <= arrangement.plan.budget_bytes
        )
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
