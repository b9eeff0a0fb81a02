"""What must be the same on every rank, compared before anything runs: versions, files, settings, and who has what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ..checkpoint.headers import Headers
from ..config.settings import OffloadConfig
from ..errors import RankError
from ..experts import MoELayer
from .group import Group

#: Settings that decide what is computed, or in which order.
SAME_SETTINGS = ("compute", "compile", "experts_implementation")


def check_peers(
    group: Group, model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, headers: Headers | None
) -> None:
    """Raise `RankError`, naming rank and difference, unless all ranks are about to run the same model.

    `headers` are those of the files it is from; None for a model that was loaded before.
    """
    told = group.exchange("peers", _facts(model, moe_layers, settings, headers), "load the model")
    for rank, facts in enumerate(told):
        differing = [name for name in told[0] if facts.get(name) != told[0][name]]
        if differing:
            what = "; ".join(f"{name} {str(facts.get(name))[:80]}, not {str(told[0][name])[:80]}" for name in differing)
            raise RankError(
                f"{group.names[rank]} runs something else than {group.names[0]}: {what}. Give every rank the same "
                "versions, the same checkpoint and the same settings (budgets may differ)"
            )
    shares = {(moe.share.rank, moe.share.world) for moe in moe_layers if moe.share is not None}
    if shares != {(group.rank, group.world)}:
        raise RankError(
            f"{group.names[group.rank]} has the share of experts of {sorted(shares)} (rank, ranks), but is one of "
            f"{group.world} processes; ranks that hold the same experts twice are not supported: load the model with "
            f"DistributedConfig(tp_size={group.world}, ep_size={group.world})"
        )


def _facts(
    model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, headers: Headers | None
) -> dict[str, Any]:
    config = model.config.to_dict()
    config.pop("distributed_config", None)
    for name in ("_name_or_path", "name_or_path"):  # each machine may have it elsewhere
        config.pop(name, None)
    return {
        **{name: version(name) for name in ("moe-offload", "torch", "transformers")},
        "model": type(model).__name__,
        "configuration": _digest(config),
        "checkpoint": None if headers is None else _digest(_entries(headers)),
        "layers": [f"{moe.name} {moe.all_experts} x {moe.layout.row_bytes} bytes" for moe in moe_layers],
        **{name: getattr(settings, name) for name in SAME_SETTINGS},
    }


def _entries(headers: Headers) -> list[Any]:
    """Where each tensor lies, but for the folder."""
    return sorted(
        (key, at.file.name, at.offset, at.nbytes, list(at.shape), str(at.dtype)) for key, at in headers.items()
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
