"""What we ask of Dynamo for what we compile, and for nothing else.

It keeps more graphs than by default, guards on hooks that are not there yet, and finds a code object of our own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch

#: Graphs that Dynamo keeps of one function; the default is 8. It warns of any more, and compiles them no longer.
MOST_GRAPHS = 256
#: While it is traced, transformers asks for torch's version, through a cache. Dynamo warns that such a cache might be
#: wrong, and the version of torch does not change.
VERSIONS_ARE_CACHED = r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function at 'moe\.py"
_numbers = itertools.count()
Function = TypeVar("Function", bound=Callable[..., Any])


def our_settings() -> AbstractContextManager[object]:
    """While it is entered, what this thread compiles is compiled so."""
    settings: AbstractContextManager[object] = torch._dynamo.config.patch(
        skip_nnmodule_hook_guards=False, recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=16 * MOST_GRAPHS
    )
    return settings


def with_own_code(function: Function, name: str) -> Function:
    """Give `function` a code object of its own: Dynamo keeps graphs, and counts them, per code object, and functions
    that are made in one place share theirs."""
    warnings.filterwarnings("ignore", VERSIONS_ARE_CACHED)
    made: Any = function
    made.__code__ = made.__code__.replace(co_name=f"moe_offload_{name}_{next(_numbers)}")
    return cast(Function, made)
