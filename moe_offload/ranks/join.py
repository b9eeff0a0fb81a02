"""Where a run of several ranks begins: the group is formed, and the ranks find that they run the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ..checkpoint.outline import Outline
from ..checkpoint.packed import Stored
from ..checkpoint.pretrained.split import split_outline
from ..config.launched import read_launched
from ..config.settings import OffloadConfig
from ..errors import OffloadError, RankError
from ..experts import MoELayer
from .call import exchanging
from .group import Group, form_group, formed_group, join_group
from .names import in_a_line
from .peers import check_peers
from .settings import check_settings, check_transformers

ATTENTION = ".self_attn."  # what rules of a tp_plan for the attention's weights have in their names
AGREE = "load the model"  # what each is doing when all wait for each other
#: How long a rank that gives up before there is a group waits for the others, to tell them. They come once they have
#: imported torch; who comes later waits for `rank_timeout`, as for a rank that never starts.
TELL_S = 60.0
#: The sizes of a DistributedConfig whose product is the number of processes.
SIZES = ("tp_size", "fsdp_size", "pp_size", "dp_replicate_size")


def config_of_ranks(world: int, model_config: Any = None) -> dict[str, Any]:
    """The `distributed_config` by which so many processes share all experts evenly.

    Attention is whole on every rank where the heads of a model with `model_config` do not go evenly over the ranks.
    """
    found: dict[str, Any] = {"tp_size": world, "ep_size": world}
    text = None if model_config is None else model_config.get_text_config()
    if any((getattr(text, heads, None) or 0) % world for heads in ("num_attention_heads", "num_key_value_heads")):
        rules = getattr(text, "base_model_tp_plan", None) or {}
        whole = {f"model.{rule}": "replicate" for rule in rules if ATTENTION in rule}
        if whole:  # else no rule splits attention, and to transformers an empty plan is that nothing is split
            found["tp_plan"] = whole
    return found


def form_ranks(distributed_config: Any, settings: OffloadConfig) -> Group | None:
    """The group that `distributed_config` asks for, formed before transformers would; None where it is for one process.

    Raises `ConfigError`, `RankError`.
    """
    if distributed_config is None:
        return None
    said = distributed_config if isinstance(distributed_config, Mapping) else vars(distributed_config)
    if math.prod(said.get(name) or 1 for name in SIZES) == 1 and said.get("tp_plan") is None:
        return None
    check_transformers()
    return form_group(settings.rank_timeout)


@contextlib.contextmanager
def told_to_ranks(distributed_config: Any) -> Iterator[None]:
    """An error inside, before this rank has met the others, is told to them as in `agreed`: else they would wait for
    it. It forms the group for that, so all may try again."""
    try:
        yield
    except Exception as error:
        tell_refusal(distributed_config, error)
        raise


def tell_refusal(distributed_config: Any, error: Exception) -> None:
    """Meet the other ranks, if there are several, and let them know that this one cannot go on."""
    if read_launched() is None and not dist.is_initialized():
        return
    with contextlib.suppress(OffloadError):  # the error that is told says more than that nobody came
        # One that is there has the time limits of the model that runs in it.
        group = formed_group() or form_ranks(distributed_config, OffloadConfig(rank_timeout=TELL_S))
        if group is not None:
            group.exchange("agreed", in_a_line(error), AGREE, TELL_S)


def split_over(group: Group | None, found: Outline, distributed_config: Any, settings: OffloadConfig) -> Outline:
    """What this rank has of a checkpoint, known to be that of the others. Raises what `join_ranks` does."""
    if group is None:
        return found
    with exchanging(group):
        found = split_outline(found, distributed_config)
    join_ranks(found.model, found.moe_layers, settings, "cpu", found.stored)
    return found


def join_ranks(
    model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, device: str, stored: Stored | None = None
) -> Group | None:
    """The group of a model whose experts are split over ranks; None of one that is whole.

    Raises `RankError` where ranks differ; `ConfigError` and `UnsupportedModelError` for what they cannot do.
    """
    if all(moe.share is None for moe in moe_layers):
        return None
    group = join_group(settings.rank_timeout)
    with agreed(group):
        check_settings(moe_layers, settings, device)
    check_peers(group, model, moe_layers, settings, stored.headers if stored else None)
    return group


@contextlib.contextmanager
def agreed(group: Group | None) -> Iterator[None]:
    """What each rank does by itself inside, all have done, or none goes on: an error of one is the end of the block for
    all, and nothing more, so they may try again. Nothing is exchanged inside.

    Raises the error of this rank, else `RankError` for that of another.
    """
    if group is None:
        yield
        return
    try:
        yield
    except Exception as error:
        group.exchange("agreed", in_a_line(error), AGREE)
        raise
    except BaseException as error:  # Ctrl-C: of this rank alone, perhaps
        if group.watch is not None:
            group.watch.tell_end(in_a_line(error))
        raise
    for rank, told in enumerate(group.exchange("agreed", "", AGREE)):
        if told:
            raise RankError(f"{group.names[rank]} cannot go on, so none can: {told}")


@contextlib.contextmanager
def or_end_for_all(group: Group | None) -> Iterator[None]:
    """An error inside the block is told to the other ranks, which would wait for this one."""
    try:
        yield
    except BaseException as error:
        if group is not None and group.watch is not None:
            group.watch.tell_end(in_a_line(error))
        raise
