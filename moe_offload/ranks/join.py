"""Where a run of several ranks begins: the group is formed, and the ranks find that they run the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checkpoint.packed import Stored
from ..config.settings import OffloadConfig
from ..errors import UnsupportedModelError
from ..experts import MoELayer
from .group import Group, form_group, join_group
from .peers import check_peers
from .settings import check_settings

#: The sizes of a DistributedConfig whose product is the number of processes.
SIZES = ("tp_size", "fsdp_size", "pp_size", "dp_replicate_size")


def config_of_ranks(world: int) -> dict[str, Any]:
    """The `distributed_config` by which so many processes share all experts evenly."""
    return {"tp_size": world, "ep_size": world}


def form_ranks(distributed_config: Any, settings: OffloadConfig) -> Group | None:
    """The group that `distributed_config` asks for, formed before transformers would; None where it is for one process.

    Raises `ConfigError`, `RankError`.
    """
    if distributed_config is None:
        return None
    said = distributed_config if isinstance(distributed_config, Mapping) else vars(distributed_config)
    if math.prod(said.get(name) or 1 for name in SIZES) == 1 and said.get("tp_plan") is None:
        return None
    form_group(settings.rank_timeout)
    return join_group(settings.rank_timeout)


def join_ranks(
    model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, device: str, stored: Stored | None = None
) -> Group | None:
    """The group of a model whose experts are split over ranks; None of one that is whole.

    Raises `RankError` where ranks differ; `ConfigError` and `UnsupportedModelError` for what they cannot do.
    """
    if all(moe.share is None for moe in moe_layers):
        return None
    check_settings(moe_layers, settings, device)
    if any(moe.packed for moe in moe_layers):
        raise UnsupportedModelError(
            "the experts are quantised, and split over ranks; that was not tried. Use a checkpoint in bfloat16, or run "
            "in one process"
        )
    group = join_group(settings.rank_timeout)
    check_peers(group, model, moe_layers, settings, stored.headers if stored else None)
    return group


@contextlib.contextmanager
def or_end_for_all(group: Group | None) -> Iterator[None]:
    """An error inside the block is told to the other ranks, which would wait for this one."""
    try:
        yield
    except BaseException as error:
        if group is not None and group.watch is not None:
            group.watch.tell_end(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        raise
