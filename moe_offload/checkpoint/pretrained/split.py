"""The outline of one process's share of a checkpoint, where transformers' expert parallelism splits its experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ConfigError, UnsupportedModelError
from ...experts import find_experts, local_part
from .own_class import is_own

if TYPE_CHECKING:
    from ..outline import Outline


def split_outline(found: Outline, distributed_config: Any) -> Outline:
    """The same, with the model split over the processes of the group as transformers would load it: its dense weights
    where a plan shards them, and of its experts, and of the index of their rows, what this process has.

    Raises `ConfigError` for what transformers refuses.
    """
    model: Any = found.model
    if found.index is None or is_own(model):
        raise UnsupportedModelError(
            f"{found.source}: distributed_config is for checkpoints of transformers' own classes, whose files are here"
        )
    try:
        said, _, mesh = type(model).prepare_distribute_model(distributed_config)
        if mesh is None:  # one process
            return found
        _untie(model)
        type(model).maybe_distribute_model(model, said, mesh)
        model.tie_weights(recompute_mapping=False)
    except (ValueError, OSError, RuntimeError) as error:  # sizes, no group, another number of processes
        raise ConfigError(f"distributed_config={distributed_config}: transformers refuses it: {error}") from error
    _check_heads(model, said.tp_size)
    moe_layers = find_experts(model)
    index = found.index.share_of(moe_layers)
    return replace(found, moe_layers=index.pack(moe_layers), index=index)


def _check_heads(model: Any, world: int) -> None:
    """Raise `ConfigError` where the attention's weights were cut within a head: its first call would fail, in torch's
    words."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, param in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and local_part(param).shape[0] % head_dim:
            raise ConfigError(
                f"{name}: {param.shape[0] // head_dim} heads do not go evenly over {world} ranks; start as many as "
                'divide them, or keep attention whole on every rank, by a rule "replicate" in the tp_plan of '
                "distributed_config for each of its weights (moe-offload run does)"
            )


def _untie(model: Any) -> None:
    """Give each name a parameter of its own: transformers splits a model before it ties its weights."""
    own = {name for name, _ in model.named_parameters()}
    for name, tied in list(model.named_parameters(remove_duplicate=False)):
        if name not in own:
            place, _, attribute = name.rpartition(".")
            copy = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
            model.get_submodule(place)._parameters[attribute] = copy
