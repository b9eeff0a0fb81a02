"""Regional compilation, as PyTorch calls it: the experts of each layer are compiled, not the model's whole call.

Two graphs, one for prompts and one for decoding, serve all layers.

    model(...)                    runs as transformers wrote it, module by module
      layer 0 ... layer L-1
        attention, norms, router  not compiled
        experts(x, ids, weights)  a region: traced once, rewritten by the passes, shared by all layers

Shapes: T tokens, K experts per token, H hidden.

On a CPU nothing needs more of the graph than that: an op of the region finds its layer from the bank it is handed. So
the first token waits for two small graphs, whatever the depth; and all that eager code looks at in each call (hooks,
replaced modules, attributes, autocast) is looked at, because it is eager code. What the region itself depends on is
guarded by Dynamo.

Of all sizes only T varies. One token is a constant, more are a symbol; so another length, a batch or a mask makes no
other graph. A region that Dynamo cannot trace in one piece runs as one op (`binding.run_op`): slower, never wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .binding import RunExperts, Scope, run_untraced
from .changed_parts import is_changed, state_of_parts
from .dynamo import MOST_GRAPHS, with_own_code
from .graphs import ops

logger = logging.getLogger("moe_offload")


class Regions:
    """Runs the experts modules of one model, each in a graph that those of its kind share.

    `make_region` gives the code that is traced, `untraced` runs a module where none is. `made` is the backend that
    Dynamo hands it to, and `log` the list to which that adds each graph. With `meets`, calls that are computed in turns
    wait for each other before their experts. There are as many graphs as kinds of calls
    (dtype, autocast, number of threads ...); where they become more than Dynamo keeps, all are dropped, and made anew
    as they are needed.
    """

    def __init__(
        self,
        scope: Scope,
        make_region: Callable[[], RunExperts],
        untraced: RunExperts,
        made: Callable[..., Any],
        log: list[Any],
        dynamic: bool | None,
        meets: bool = False,
    ) -> None:
        self._scope, self._make_region, self._untraced = scope, make_region, untraced
        self._made, self._log, self._dynamic, self._meets = made, log, dynamic, meets
        self.renew()

    def renew(self) -> None:
        """Forget all graphs, and what could not be traced."""
        self._untraceable: set[Hashable] = set()
        self._since = len(self._log)
        self._shared = self._compile()
        self._own: dict[Any, RunExperts] = {}

    def _compile(self) -> RunExperts:
        compiled: RunExperts = torch.compile(
            self._make_region(),
            backend=self._made,
            dynamic=False if self._dynamic is False else None,  # which sizes vary is said by `_with_any_length`
        )
        return compiled

    def _compiled_of(self, module: Any) -> RunExperts:
        """Code of a user's may ask which module it runs in, and Dynamo does not guard on the answer: so where there is
        any, the module shares its graphs with no other."""
        if not is_changed(module):
            return self._shared
        if module not in self._own:
            self._own[module] = self._compile()
        return self._own[module]

    def run(self, module: Any, *given: Tensor) -> Tensor:
        """The output `[T, H]` of the experts `module`, in a call of the model or in one of a part of it. It is `given`
        x [T, H], and ids and weights [T, K] where its form has any."""
        if self._scope.is_entered:
            meeting = self._scope.meeting if self._meets else None
            output = None if meeting is None else meeting.experts(module, given)
            return self._run(module, given) if output is None else output
        with self._scope.entered():
            return self._run(module, given)

    def _run(self, module: Any, given: tuple[Tensor, ...]) -> Tensor:
        if torch._C._len_torch_dispatch_stack():  # in a dispatch mode nothing is traced
            return self._untraced(module, *given)
        if self._untraceable and _kind_of(module) in self._untraceable:
            return self._untraced(module, *given)
        if max(len(self._log) - self._since, len(self._untraceable)) >= MOST_GRAPHS:
            self.renew()
        sized = _with_any_length(given) if self._dynamic and len(given[0]) > 1 else given
        try:
            return self._compiled_of(module)(module, *sized)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise error.inner_exception from None
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning(
                "%s cannot be traced in one piece, so its experts run as one op a layer, which is slower: %s",
                type(module).__name__, str(error).partition("\n")[0],
            )  # fmt: skip
            self._untraceable.add(_kind_of(module))
        return self._untraced(module, *given)


def _kind_of(module: Any) -> Hashable:
    return torch._C._len_torch_function_stack() > 0, state_of_parts(module)


def _with_any_length(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views whose first size is a symbol of the graph. Views, because the mark stays on the object."""
    views = tuple(x.detach() for x in given)
    for view in views:
        torch._dynamo.maybe_mark_dynamic(view, 0)
    return views


def make_region(original: RunExperts) -> RunExperts:
    """What is traced of a module of the experts interface; `original` is transformers' own code."""

    def region(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():  # Dynamo is switched off, or has left this call alone
            return run_untraced(module, x_TH, ids_TK, weights_TK)
        with torch._dynamo.error_on_graph_break(True):  # a part of a region would be no use
            return original(module, x_TH, ops.mark_unserved(ids_TK, module._moe_offload.rows), weights_TK)

    return with_own_code(region, "region")
