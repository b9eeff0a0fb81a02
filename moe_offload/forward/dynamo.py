"""Settings of Dynamo that hold for what moe_offload compiles, and for nothing else in the process.

By default Dynamo keeps 8 graphs of a function, and does not guard on hooks where there are none yet: a hook that is put
on later is never called. Other settings take 65 us in each call, so they are used only once they are needed. On hooks
of all modules, and on the methods of classes, Dynamo never guards: after such a change all graphs must go.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.utils.hooks import RemovableHandle

FEW_GRAPHS = 6  # Dynamo keeps two more of one function by default
#: Graphs that Dynamo then keeps of one function. It warns of any more, and compiles them no longer.
MOST_GRAPHS = 256
#: While it is traced, transformers asks for torch's version, through a cache. Dynamo warns that such a cache might be
#: wrong, and the version of torch does not change.
VERSIONS_ARE_CACHED = r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function at 'moe\.py"
_numbers = itertools.count()
Function = TypeVar("Function", bound=Callable[..., Any])


class Settings:
    """Dynamo's settings for what is traced of one model: `parts` are the modules that graphs hold, and `log` has an
    entry for each graph."""

    def __init__(self, parts: Sequence[nn.Module], log: list[Any]):
        # Weak: the runtime reaches these settings, and what frees it when the model goes must not hold the model.
        self._parts, self._log = [weakref.ref(part) for part in parts], log
        self._kinds: list[Any] = list(dict.fromkeys(type(one) for part in parts for one in part.modules()))
        self._last_hook = -1
        self._guards_on_hooks = False
        self._unguarded = self._find_unguarded()

    def find_unguarded_change(self) -> bool:
        """Whether something has changed that no graph guards on: all graphs there are must go then."""
        before, self._unguarded = self._unguarded, self._find_unguarded()
        return before != self._unguarded or self._find_new_hooks()

    def _find_unguarded(self) -> tuple[Any, ...]:
        """What Dynamo never guards on: hooks on all modules, and the methods of classes."""
        methods = [(kind.forward, getattr(kind, "_apply_gate", None)) for kind in self._kinds]
        return (*all_modules._global_forward_hooks, None, *all_modules._global_forward_pre_hooks, *methods)

    def _find_new_hooks(self) -> bool:
        """Whether hooks have appeared that no graph guards on as yet.

        Every hook that is put on anywhere takes a number, so there is nothing to look at while none is.
        """
        if self._last_hook == count_hooks():
            return False
        self._last_hook = count_hooks()
        if self._guards_on_hooks:
            return False
        parts = [part for part in (held() for held in self._parts) if part is not None]
        modules = [module for part in parts for module in part.modules()]
        self._guards_on_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        return self._guards_on_hooks

    def entered(self) -> AbstractContextManager[object]:
        """A context in which this thread compiles with more graphs and with guards on hooks, if it has come to that."""
        if not self._guards_on_hooks and len(self._log) < FEW_GRAPHS:
            return contextlib.nullcontext()
        settings: AbstractContextManager[object] = torch._dynamo.config.patch(
            skip_nnmodule_hook_guards=False, recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=16 * MOST_GRAPHS
        )
        return settings


def count_hooks() -> int:
    """How many hooks were ever put on, anywhere in the process."""
    number: int = RemovableHandle.next_id
    return number


def never_traced(function: Function) -> Function:
    """`function`, which Dynamo neither traces into another's graph nor, with all that it calls, by itself.

    torch.compiler.disable does the same, and takes some microseconds in each call.
    """
    made: Any = function
    made._torchdynamo_disable = True
    made._torchdynamo_disable_msg = "moe_offload: experts that are called, or read, one by one are in no graph"
    dynamo: Any = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(made.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


def with_own_code(function: Function, name: str) -> Function:
    """`function` with a code object and global names of its own. Dynamo keeps graphs, and counts them, per code object,
    and functions that are made in one place share theirs; what it compiles it keeps among the function's globals, which
    would be those of our module, for ever. So the graphs go with the function."""
    warnings.filterwarnings("ignore", VERSIONS_ARE_CACHED)
    given: Any = function
    code = given.__code__.replace(co_name=f"moe_offload_{name}_{next(_numbers)}")
    made = FunctionType(code, dict(given.__globals__), given.__name__, given.__defaults__, given.__closure__)
    # Dynamo's own table has the code live as long as its graphs, which it holds itself: neither would ever go.
    weakref.finalize(made, torch._dynamo.eval_frame.remove_from_cache, made.__code__).atexit = False
    return cast(Function, made)
