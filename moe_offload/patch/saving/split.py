"""Saving where several ranks share a model's experts: refused, since each has a part."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ...errors import SaveError


def refuse_saving(model: nn.Module) -> None:
    """Let state_dict() and save_pretrained() of `model` and of its parts with experts say why not, and what to do."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__["save_pretrained"] = _refuse
    model.register_state_dict_pre_hook(_refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise SaveError(
        "the experts of this model are shared by several ranks, and none has all of them; nothing was written. Save "
        "from one process: moe_offload.from_pretrained(path, budget).save_pretrained(folder)"
    )
