"""What a run of several ranks cannot do: refused by name, before anything is loaded or changed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ..config.settings import OffloadConfig
from ..errors import ConfigError, UnsupportedModelError
from ..experts import MoELayer

#: Settings that would cut a graph through transformers' exchanges, or hold a slot for a pair of another rank.
REFUSED: dict[str, tuple[Any, ...]] = {
    "compile": ("inductor",),
    "decide": ("device",),
    "overlap": (False,),
    "lookahead": (True,),
    "fullgraph": (True,),
}


def check_transformers() -> None:
    """Raise `UnsupportedModelError` where transformers splits experts as it did before there was `ep_size` (5.19).

    With 5.17 two ranks gave different outputs: there the experts' own sums are exchanged in another place.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        raise UnsupportedModelError(
            f"transformers {version('transformers')} splits experts over processes in a way that is not supported; "
            "install 5.19 or newer, or run in one process"
        )


def check_settings(moe_layers: Sequence[MoELayer], settings: OffloadConfig, device: str) -> None:
    """Raise `ConfigError` or `UnsupportedModelError` for what is not done where ranks share the experts."""
    for name, values in REFUSED.items():
        if getattr(settings, name) in values:
            raise ConfigError(
                f"{name}={getattr(settings, name)!r} is not possible where several ranks share the experts; leave it "
                "out, or run in one process"
            )
    if device != "cpu":
        raise UnsupportedModelError(
            f"the model computes on {device}; expert parallelism was built and tried on CPUs only. Hide the GPU "
            "(CUDA_VISIBLE_DEVICES=), or run in one process"
        )
    alone = next((moe.name for moe in moe_layers if moe.share is None), None)
    if alone is not None:
        raise UnsupportedModelError(
            f"{alone}: its experts are not split over the ranks, those of other layers are; run in one process"
        )
    if any(moe.packed for moe in moe_layers):
        raise UnsupportedModelError(
            "the experts are quantised, and split over ranks; that was not tried. Use a checkpoint in bfloat16, or run "
            "in one process"
        )
