"""Run Mixture-of-Experts language models that do not fit: hot experts stay, the rest stream in just in time.

    model = moe_offload.from_pretrained("path/to/checkpoint", budget="8GB")
    model = moe_offload.optimize(model, budget="8GB")

Names are loaded on first use, so that importing the package costs no more than a dictionary.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .api import from_pretrained, make_plan, optimize
    from .config import OffloadConfig
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
        RoutingError,
        SaveError,
        TraceError,
        UnsupportedModelError,
    )
    from .forecasting import Forecast, forecast
    from .pack import pack_checkpoint
    from .profile import Profile
    from .record import record_profile
    from .trace import Trace


_HOMES = {
    "api": ["from_pretrained", "make_plan", "optimize"],
    "config": ["OffloadConfig"],
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
        "RoutingError",
        "SaveError",
        "TraceError",
        "UnsupportedModelError",
    ],
    "forecasting": ["Forecast", "forecast"],
    "pack": ["pack_checkpoint"],
    "profile": ["Profile"],
    "record": ["record_profile"],
    "trace": ["Trace"],
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
    "record_profile",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
