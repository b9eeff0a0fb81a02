"""Decode steps whose guards need not be asked in full: nothing that they look at has changed since they last held.

For 48 layers Dynamo asks some 8000 guards before it runs what it has compiled, at each step, and nearly all of them
read what hangs on the model or lies in the layers of its KV cache. After a step whose guards held, we keep in their
place what they relied on (`kept.py`). Where anything differs, Dynamo is asked, compiles if it must, and the step after
that is kept anew.

The code that is run is Dynamo's, and so is what it does besides computing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..batch_sizes import find_cache
from ..graphs.compiling import count_runs
from .kept import Kept, keep_step, versions_of

logger = logging.getLogger("moe_offload")
MOST = 4  # that are kept of one function: one for each length of cache
TRIES = 8  # that may turn out of no use, one after the other, before it is given up


class SteadySteps:
    """A compiled function of decode steps, `compiled` by torch.compile from a function of (*args, **kwargs) that closes
    over `model`. `hooks` says how many hooks were ever put on."""

    def __init__(self, compiled: Callable[..., Any], hooks: Callable[[], int]):
        self._compiled, self._hooks = compiled, hooks
        self._function: Any = getattr(compiled, "_torchdynamo_orig_callable", None)
        self._kept: list[Kept] = []  # the last one used first
        self._useless = 0
        self._last: Any = None  # of the step before: the layers of its cache, by id, and their versions
        self.taken = 0  # steps that went past Dynamo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, kept in enumerate(self._kept):
            if kept.holds(args, kwargs, self._hooks()):
                if i:
                    self._kept.insert(0, self._kept.pop(i))
                self._useless = 0
                self.taken += 1
                return kept.run(*args, **kwargs)
        before = count_runs()
        output = self._compiled(*args, **kwargs)
        if count_runs() == before + 1:  # more, where a graph breaks: then each part is compiled on its own
            self._keep(args, kwargs)
        return output

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what this step has relied on, if the step before was one with the same cache: it takes a tenth of a
        second, and what is compiled may change the model's objects once more. A layer of the cache that changes with
        each step (of a sliding window, it counts) is left to Dynamo."""
        layers = getattr(find_cache(kwargs), "layers", None)
        last, self._last = self._last, layers and [(id(layer), versions_of((layer,))) for layer in layers]
        if self._function is None or self._useless >= TRIES or not layers or not last:
            return
        if [i for i, _ in last] != [i for i, _ in self._last]:
            return
        self._useless += 1
        steady = [i for i, layer in enumerate(layers) if last[i][1].check({"held": (layer,)})]
        try:
            kept = keep_step(self._function, args, kwargs, self._hooks(), steady)
        except Exception:  # of another version of torch: guards are asked as ever
            self._useless = TRIES
            logger.debug("the guards of decode steps are asked in full at each of them", exc_info=True)
            return
        if kept is not None:  # what of the others can never hold again would keep weights alive that were replaced
            self._kept = [kept, *(one for one in self._kept if one.may_hold())][:MOST]
