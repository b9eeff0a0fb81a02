"""`get_compiled_call` of an offloaded model: transformers' contract, and no second compiler.

`generate` asks it for what runs its decode steps, wherever it compiles them: on a GPU with a static cache, elsewhere on
demand. The model's own call compiles its experts already, and in a torch.compile around it they would be one op a
layer. So the answer is that call, kept in `_compiled_call` as transformers keeps it: code that asks whether `generate`
has compiled is told that it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

logger = logging.getLogger("moe_offload")


def keep_compiled_call(model: nn.Module) -> None:
    """Let `generate` decode through the call of an offloaded `model`, compiled as `optimize` was told."""
    model.__dict__["get_compiled_call"] = lambda compile_config: _get_compiled_call(model, compile_config)


def _get_compiled_call(model: Any, compile_config: Any) -> Callable[..., Any]:
    known = vars(model)
    if "_compiled_call" in known and compile_config in (None, known["_last_compile_config"]):
        return known["_compiled_call"]  # type: ignore[no-any-return]
    if compile_config is not None:
        logger.warning(
            "compile_config=%s is not used: an offloaded model is compiled by moe_offload, as optimize() was told "
            "(config={'compile': ..., 'dynamic': ..., 'fullgraph': ...}), and gives the tokens of the plain model that "
            "is not compiled. torch.compile(model, ...) compiles it as you say, with its experts as one op a layer",
            compile_config,
        )
    known["_last_compile_config"], known["_compiled_call"] = compile_config, model.__call__
    return known["_compiled_call"]  # type: ignore[no-any-return]
