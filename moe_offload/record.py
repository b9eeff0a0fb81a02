"""Record which experts a workload uses, with or without offload.

On an offloaded model the cache counts anyway. On an ordinary one the `instrument` pass puts counters into the compiled
graph: the model runs with its own weights and its own results, and each layer's ids pass through an `observe` op. Where
the model's own code calls its experts one by one, hooks on them count, and nothing is compiled.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .cache.counters import LayerCounters
from .errors import ProfileError, UnsupportedModelError
from .experts import MoELayer, find_experts, members_of
from .forward.call import whole_call
from .forward.called.counting import count_reads
from .forward.called.modules import rows_of
from .forward.graphs.observing import bind_counter, observing_backend, unbind_counter
from .observe.profile import Profile
from .patch.install import IMPLEMENTATIONS, choose_implementation
from .plan.weights import take_fingerprint


class Count:
    """Uses per expert of one layer: what an observed weight is bound to."""

    def __init__(self, moe: MoELayer):
        self.moe, self.tokens, self.counts = moe, 0, torch.zeros(moe.num_experts, dtype=torch.int64, device="cpu")
        self.used: Counter[int] = Counter()  # of the forward that is going on, where experts are called one by one

    def observe(self, ids_P: Tensor) -> None:
        self.tokens += self.moe.tokens_of(ids_P.numel())
        self.counts += torch.bincount(ids_P.reshape(-1), minlength=len(self.counts))

    def observe_calls(self) -> Iterator[RemovableHandle]:
        """Count the calls of experts until the handles are removed; `end_forward` says where a forward ends."""
        for e, expert in members_of(self.moe):
            yield expert.register_forward_pre_hook(partial(self._called, e), with_kwargs=True)

    def end_forward(self) -> None:
        if self.used:
            self.tokens += max(self.moe.tokens_of(sum(self.used.values())), *self.used.values(), 0)
            self.used.clear()

    def _called(self, e: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of(args, kwargs)
        if rows:
            self.add_use(e, rows)

    def add_use(self, e: int, rows: int) -> None:
        """Expert `e` was used for so many rows."""
        self.counts[e] += rows
        self.used[e] += rows

    def counters(self) -> LayerCounters:
        return LayerCounters(tokens=self.tokens, counts=self.counts.tolist())


def record_profile(model: Any, inputs: Any, **meta: str) -> Profile:
    """Run `model` over `inputs` and count how often each layer uses each expert. The model need not be offloaded.

    Args:
        model: A transformers model with routed experts.
        inputs: One batch, or an iterable of batches. A batch is a tensor of token ids `[B, T]`, or a mapping of keyword
            arguments (what a tokenizer returns), nested as the model likes. Every token of a batch counts.
        **meta: What is kept in the profile as text, for example `language="it"`.

    Returns:
        The `Profile`: `counts[l][e]` is how many tokens used expert e of MoE layer l.

    Raises:
        ProfileError: Nothing was counted: the inputs hold no token, or never reach an experts module.
        UnsupportedModelError: The model has no experts that can be counted.

    Example:

        ```python
        profile = moe_offload.record_profile(model, inputs, language="it")
        profile.save("italian.json")
        ```
    """
    batches = [inputs] if isinstance(inputs, (Tensor, Mapping)) else inputs
    if hasattr(model, "moe_offload"):
        before = model.moe_offload.profile()
        _run_batches(model, batches)
        after = model.moe_offload.profile()
        counts = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(after.counts, before.counts, strict=True)]
        return Profile.of(after.fingerprint, tokens=after.tokens - before.tokens, counts=counts, meta=meta)
    moe_layers = find_experts(model)
    if any(moe.called for moe in moe_layers):
        return _record_calls(model, batches, moe_layers, meta)
    implementation = choose_implementation(moe_layers, "auto")
    weights = {id(p): (moe, field) for moe in moe_layers for field, p in moe.params.items()}
    counters = [Count(moe) for moe in moe_layers]
    modules = [module for moe in moe_layers if moe.form == "interface" for module in moe.modules]
    was = [(module.config, module.config._experts_implementation) for module in modules]
    try:
        for moe, counter in zip(moe_layers, counters, strict=True):
            bind_counter(moe, counter)
        for config, chosen in was:
            if chosen not in IMPLEMENTATIONS:  # 'eager' experts never enter a graph
                config._experts_implementation_internal = implementation
        _run_batches(model, batches, torch.compile(whole_call(model), backend=observing_backend(weights), dynamic=True))
    finally:
        for moe in moe_layers:
            unbind_counter(moe)
        for config, chosen in was:
            config._experts_implementation_internal = chosen
    return _profile(model, moe_layers, counters, meta)


def _record_calls(model: Any, batches: Iterable[Any], moe_layers: Sequence[MoELayer], meta: dict[str, str]) -> Profile:
    others = [moe.name for moe in moe_layers if not moe.called]
    if others:
        raise UnsupportedModelError(
            f"{others[0]}: the experts of other layers are called one by one, and of these nobody hears as they are; "
            "optimize() the model, and take model.moe_offload.profile()"
        )
    counters = [Count(moe) for moe in moe_layers]

    def call(*args: Any, **kwargs: Any) -> None:
        model(*args, **kwargs)
        for counter in counters:
            counter.end_forward()

    with contextlib.ExitStack() as undo:
        for counter in counters:
            if counter.moe.form == "modules":
                for handle in counter.observe_calls():
                    undo.callback(handle.remove)
            else:
                undo.enter_context(count_reads(counter.moe, counter.add_use))
        _run_batches(model, batches, call)
    return _profile(model, moe_layers, counters, meta)


def _profile(model: Any, moe_layers: Sequence[MoELayer], counters: Sequence[Count], meta: dict[str, str]) -> Profile:
    if not any(counter.tokens for counter in counters):
        raise ProfileError("record_profile counted nothing: the inputs hold no token, or never reach an experts module")
    return Profile.of_layers(take_fingerprint(model, moe_layers), [counter.counters() for counter in counters], meta)


@torch.no_grad()
def _run_batches(model: Any, batches: Iterable[Any], call: Callable[..., Any] | None = None) -> None:
    call = call or model
    device = next(model.parameters()).device
    for batch in batches:
        tree: Any = dict(batch) if isinstance(batch, Mapping) else batch
        batch = optree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)
        if isinstance(batch, dict):
            call(**batch)
        else:
            call(batch)
