"""Whether all that runs inside an experts module is transformers' own code; asked where no trace shows what runs.

Without a trace the experts code is called for the tokens of a few experts at a time. Of transformers' own code that
makes no difference; of a hook on its activation, or of another activation, it may.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import UnsupportedModelError

ELSEWHERE = (
    "Offloaded experts run for the tokens of a few experts at a time: put it on the experts module itself or on the "
    "module around it, or let it treat each element by itself, keep nothing, and be traceable by Dynamo in one piece"
)


def explain_refusal(modules: Iterable[nn.Module]) -> str:
    """Why the passes refuse the code of these experts modules: a change that a user made, or the family's own code."""
    changes = [change for module in modules for change in _find_changes(module)]
    if changes:
        return f"there is {changes[0]}. {ELSEWHERE}"
    return "please report this model family. Its weights were offloaded, so it cannot be run as it is"


def refuse_changed_parts(module: nn.Module) -> None:
    """Raise where something inside an experts module, that is not transformers' own, would be called with pieces."""
    for change in _find_changes(module):
        raise UnsupportedModelError(f"{type(module).__name__}: there is {change}, which was not traced. {ELSEWHERE}")


def refuse_unseen_modes(module: nn.Module) -> None:
    """Raise if a dispatch or function mode is on that is not torch's: an experts module is one op there, and hides what
    runs inside. torch's own modes (they count, or name a device) change nothing of that."""
    for mode in (*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()):
        if not type(mode).__module__.startswith("torch."):
            raise UnsupportedModelError(
                f"{type(module).__name__}: it is called in a {type(mode).__name__}, and is one op there, in which "
                "a mode sees nothing. Leave the mode before you call the model; a TorchFunctionMode may stay if Dynamo "
                "can trace it in one piece"
            )


def is_changed(module: Any) -> bool:
    """Whether something that is not transformers' own runs inside an experts module."""
    return next(_find_changes(module), None) is not None


def state_of_parts(module: Any) -> Hashable:
    """All that decides what runs inside an experts module. One that could not be traced is tried again when this
    changes."""
    hooks = tuple(all_modules._global_forward_hooks), tuple(all_modules._global_forward_pre_hooks)
    parts = tuple(
        (type(part), tuple(part._forward_hooks), tuple(part._forward_pre_hooks), vars(part).get("forward"))
        for part in list(module.modules())[1:]
    )
    own = (
        type(module),
        getattr(type(module), "_apply_gate", None),
        vars(module).get("_apply_gate"),
        vars(module).get("act_fn"),
    )
    return hooks, parts, own


def _find_changes(module: Any) -> Iterator[str]:
    """Each change in words. It is asked at every call of every layer, so it looks at few things."""
    for hook in (*all_modules._global_forward_hooks.values(), *all_modules._global_forward_pre_hooks.values()):
        if not str(getattr(hook, "__module__", "")).startswith("torch."):  # torch's own only count (FLOPs)
            yield "a hook on all modules"
    own = vars(module)
    gate = getattr(type(module), "_apply_gate", None)
    if "_apply_gate" in own or (gate is not None and not _is_transformers_own(gate)):
        yield "another gating (_apply_gate) than transformers'"
    if "act_fn" in own:
        yield f"another act_fn ({own['act_fn']!r}) than transformers'"
    for name, part in module.named_children():
        if part._forward_hooks or part._forward_pre_hooks:
            yield f"a hook on its {name}"
        kind: Any = type(part)
        if part._modules or "forward" in vars(part) or not _is_known(kind, kind.forward):
            yield f"another {name} ({type(part).__name__}) than transformers'"


@functools.cache
def _is_known(kind: Any, forward: Any) -> bool:
    from transformers.activations import ACT2CLS

    activations = {one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values()}
    known = kind in activations or kind.__module__.startswith("transformers.models.")
    return known and _is_transformers_own(forward)


def _is_transformers_own(method: Any) -> bool:
    """Whether transformers, or torch (as for some activations), defines a method."""
    return str(method.__module__).startswith(("transformers.", "torch.nn.modules."))
