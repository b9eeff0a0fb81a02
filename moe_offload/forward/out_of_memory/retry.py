"""One forward; and where the device runs out of memory, once more with fewer slots, if that can be exact.

A forward that failed half way may have added to its KV cache. It is run again only where that has been taken back
(`kv_undo.py`); else its caller, who has the tokens, has to begin anew. The layers that had been asked count those
requests twice, as does the policy: that costs slots their order for a while, never a token.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...config.sizes import format_size
from ...errors import OffloadError
from ...plan.weights import RESERVED_PROMPT_TOKENS
from ...runtime.model import Runtime
from ..batch_sizes import Steps, find_cache
from ..binding import Scope
from ..dynamo import count_hooks
from ..graphs.recordings import forget_recordings
from ..steady.steps import SteadySteps
from .kv_undo import remember_caches
from .shrink import shrink_banks

logger = logging.getLogger("moe_offload")
ADVICE = (
    "give the model a smaller budget, or one that counts what it is used for (kv_tokens for the whole context), or "
    f"read prompts in smaller pieces: generate(..., prefill_chunk_size={RESERVED_PROMPT_TOKENS})"
)

#: CUDA's messages when there is no memory for what torch's allocator does not hold: graphs, code, library workspaces.
NO_MEMORY = ("CUDA error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")


class Retry:
    """What runs the forwards of one model. `compile` returns the compiled model, without any graph as yet.

    `compile_growing` is given where steps with a KV cache that grows are compiled otherwise than those with a static
    one: with sizes that are constants until they change they would be compiled twice, and the first never used again.
    """

    def __init__(
        self,
        runtime: Runtime,
        scope: Scope,
        compile: Callable[[], Callable[..., Any]],
        compile_growing: Callable[[], Callable[..., Any]] | None = None,
    ):
        self.runtime, self.scope, self.compile, self.compile_growing = runtime, scope, compile, compile_growing
        scope.on_renewal(self._begin)
        self._begin()

    def __call__(self, sequences: int, tokens: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of a forward of so many `tokens` in each of the `sequences`."""
        take_back = remember_caches((args, kwargs), tokens) if self._runs_out() else None
        run = self._find(sequences, tokens, kwargs)
        try:
            return run(*args, **kwargs)
        except BaseException as error:
            failed = _out_of_memory(error)
            if failed is None:
                raise
        del run
        _forget(failed)
        self.scope.renew()  # before the banks shrink: the graphs hold memory
        forget_recordings()  # one may have been interrupted
        before = self.runtime.slots
        freed = shrink_banks(self.runtime)
        if not freed:
            raise _advised(failed, "and no layer has a slot to spare")
        given = (
            f"{format_size(freed)} of expert slots were given back ({_range(self.runtime.slots)} instead of "
            f"{_range(before)} in each layer)"
        )
        if take_back is None or not take_back():
            raise OffloadError(
                f"the device ran out of memory in a forward of {sequences * tokens} tokens. {given}, but its KV cache "
                f"cannot be put back to what it was, so call generate(...) again, with a new cache. To avoid it, "
                f"{ADVICE}"
            ) from failed
        logger.warning(
            "the device ran out of memory in a forward of %d tokens: %s, and it is run again. From now on fewer "
            "experts are found in slots. To avoid it, %s",
            sequences * tokens, given, ADVICE,
        )  # fmt: skip
        try:
            return self._find(sequences, tokens, kwargs)(*args, **kwargs)
        except BaseException as error:
            again = _out_of_memory(error)
            if again is None:
                raise
        raise _advised(again, f"a second time, after {given}")

    def _begin(self) -> None:
        makers = [self.compile, self.compile_growing or self.compile]
        self._runs = [(make(), Steps(make, self._most_sequences)) for make in dict.fromkeys(makers)]
        compiled = self._runs[0][0]
        self.steps = SteadySteps(compiled, count_hooks)
        self._runs[0] = compiled, Steps(lambda: SteadySteps(self.compile(), count_hooks), self._most_sequences)

    def _find(self, sequences: int, tokens: int, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        if getattr(find_cache(kwargs), "is_compileable", False):
            compiled, steps = self._runs[0]
            compiled = self.steps if tokens == 1 and self.runtime.device_caches is not None else compiled
        else:
            compiled, steps = self._runs[-1]
        return steps.find(sequences, tokens) or compiled

    def _runs_out(self) -> bool:
        """Whether the device can run out of memory with an error. A CPU cannot, and to remember its cache takes 3 us a
        layer."""
        return self.runtime.layers[0].device.type != "cpu"

    def _most_sequences(self) -> int:
        """The most sequences of a decode step for which the device decides; 0 where it does not decide."""
        if self.runtime.device_caches is None:
            return 0
        return min(layer.cache.slots // layer.moe.top_k for layer in self.runtime.layers)


def _out_of_memory(error: BaseException) -> RuntimeError | None:
    """What the device's allocator raised, or CUDA and its libraries where they allocate by themselves; perhaps while a
    graph was compiled, in Dynamo's wrapping."""
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, torch.OutOfMemoryError):
        return inner
    return inner if isinstance(inner, RuntimeError) and any(words in str(inner) for words in NO_MEMORY) else None


def _forget(error: BaseException) -> None:
    """Free what the failed forward had computed: the error holds the frames it went through, and they hold tensors."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__


def _advised(error: RuntimeError, what: str) -> RuntimeError:
    error.args = (f"{error}\nmoe_offload: the device ran out of memory, {what}. To avoid it, {ADVICE}.",)
    return error


def _range(slots: Sequence[int]) -> str:
    return f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
