"""Run Mixture-of-Experts language models that do not fit: hot experts stay, the rest stream in just in time.

    model = moe_offload.from_pretrained("path/to/checkpoint", budget="8GB")
    model = moe_offload.optimize(model, budget="8GB")

Names are loaded on first use, so that importing the package costs no more than a dictionary.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import from_pretrained, optimize
    from .config.settings import OffloadConfig
    from .errors import (
        BudgetError,
        CheckpointChangedError,
        CheckpointError,
        ClosedError,
        ConfigError,
        ExpertReadError,
        OffloadError,
        PackError,
        ProfileError,
        RankError,
        RoutingError,
        SaveError,
        TraceError,
        UnsupportedModelError,
    )
    from .observe.profile import Profile
    from .observe.trace import Trace
    from .pack import pack_checkpoint
    from .plan.forecast import Forecast, forecast, make_plan
    from .quantise import quantise_checkpoint
    from .record import record_profile


_HOMES = {
    "api": ["from_pretrained", "optimize"],
    "config.settings": ["OffloadConfig"],
    "errors": [
        "BudgetError",
        "CheckpointChangedError",
        "CheckpointError",
        "ClosedError",
        "ConfigError",
        "ExpertReadError",
        "OffloadError",
        "PackError",
        "ProfileError",
        "RankError",
        "RoutingError",
        "SaveError",
        "TraceError",
        "UnsupportedModelError",
    ],
    "plan.forecast": ["Forecast", "forecast", "make_plan"],
    "pack": ["pack_checkpoint"],
    "quantise": ["quantise_checkpoint"],
    "observe.profile": ["Profile"],
    "record": ["record_profile"],
    "observe.trace": ["Trace"],
}

__all__ = [
    "BudgetError",
    "CheckpointChangedError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "ExpertReadError",
    "Forecast",
    "OffloadConfig",
    "OffloadError",
    "PackError",
    "Profile",
    "ProfileError",
    "RankError",
    "RoutingError",
    "SaveError",
    "Trace",
    "TraceError",
    "UnsupportedModelError",
    "forecast",
    "from_pretrained",
    "make_plan",
    "optimize",
    "pack_checkpoint",
    "quantise_checkpoint",
    "record_profile",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
