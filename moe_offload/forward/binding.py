"""How a patched module, and the graphs traced from it, reach the bank of their layer; and how they lose it again."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..errors import OffloadError, UnsupportedModelError
from ..observe import progress
from ..runtime.layer import LayerRuntime
from ..runtime.lock import closed_error
from ..runtime.model import Runtime
from .changed_parts import refuse_unseen_modes
from .dynamo import Settings
from .graphs import ops
from .graphs.masked import MaskedLayer

TURN_S = 60.0  # a part of a model that is called by itself waits no longer for a call of the model
_sets = itertools.count()
#: `scope`: the Scope of the offloaded model whose call this thread is in. `refused`: what `refuse_through` has raised.
_inside = threading.local()


def banks_of_this_thread() -> str:
    """The name of the set of banks of the offloaded model whose call this thread is in; empty in no call.

    Dynamo runs it where it traces, and takes the answer for a constant. (`torch.compiler.is_compiling()` would not do:
    it is true in every thread while one of them compiles.)
    """
    scope: Scope | None = getattr(_inside, "scope", None)
    return "" if scope is None else scope.banks


#: What torch._dynamo.assume_constant_result would set. Importing Dynamo takes seconds, and only compiling needs it.
banks_of_this_thread._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_through(refuse: Callable[[], NoReturn]) -> NoReturn:
    """`refuse`, where TorchScript may have called: it makes a RuntimeError without a word of whatever is raised, so the
    call of the model that ends with one raises what was meant."""
    try:
        refuse()
    except OffloadError as error:
        _inside.refused = error.with_traceback(None)
        raise


class Meeting(Protocol):
    """Several calls of one model that a thread computes in turns (`apps/together`): where they wait for each other."""

    def is_inside(self) -> bool:
        """Whether what runs now is one of them. Then their thread has the model, and they share its scope."""

    def crowd(self) -> int:
        """How many calls there are, at least 1."""

    def before_forward(self, tokens: int) -> None:
        """A forward of so many tokens of each sequence is about to begin."""

    def experts(self, module: Any, given: tuple[Tensor, ...]) -> Tensor | None:
        """The experts `module` is about to be given hidden states, ids and weights. Its output, where it was computed
        with that of others; None where it is to be computed now."""

    def multiply(self, linear: Any, x_MI: Tensor) -> Tensor | None:
        """The same of a linear layer whose products may have rows of several calls."""


class Scope:
    """A call of one model, by one thread; and the set of banks that its graphs are made for.

    Graphs may hold the number of slots of their banks. So no graph of another set is ever run again, wherever Dynamo
    keeps it: it guards on the name. (A name, because Dynamo may take a number for a variable.)
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime, self._settings = runtime, settings
        self._forget: weakref.WeakMethod[Callable[[], None]] | None = None  # weak: it holds the model
        self.banks = f"set {next(_sets)}"
        self.meeting: Meeting | None = None  # while calls are computed in turns

    def renew(self) -> None:
        """Forget all graphs: the model has other banks, or something that the graphs rely on has changed."""
        self.banks = f"set {next(_sets)}"
        forget = None if self._forget is None else self._forget()
        if forget is not None:
            forget()

    def on_renewal(self, forget: Callable[[], None]) -> None:
        """Call `forget` at each `renew`. It is a method, held weakly, so that the scope keeps no model alive."""
        self._forget = weakref.WeakMethod(forget)

    @property
    def is_entered(self) -> bool:
        """Whether this thread is in a call of the model."""
        return getattr(_inside, "scope", None) is self

    def wait_for_turn(self, name: str) -> None:
        """Wait, before a part of the model is called by itself, for the call of the model that runs now.

        Raises `UnsupportedModelError` where that does not end: the model's code has started this thread, and waits.
        """
        if threading.current_thread() is threading.main_thread():  # nobody has started that one
            return
        if not self.runtime.lock.acquire(timeout=TURN_S):
            raise UnsupportedModelError(
                f"{name}: its experts are called in a thread of their own, and the model's own call has not ended for "
                f"{TURN_S:.0f} s. If the model's code starts such threads, it cannot be offloaded: experts take turns "
                "in the slots, in the thread that calls the model"
            )
        self.runtime.lock.release()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the block this thread alone runs the model, and what it compiles is compiled for this model.

        Raises `ClosedError` after `close`, and in a process that was forked from the model's.
        """
        if self.meeting is not None and self.meeting.is_inside():
            with self._one_call():
                yield
        else:
            with self.alone(), self._one_call():
                yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """As `entered`, for several calls that share it."""
        runtime = self.runtime
        with runtime.lock, runtime.busy(), runtime.current(), torch.no_grad(), progress.showing_compilation():
            runtime.check_open()
            if self._settings.find_unguarded_change():
                self.renew()
            before, _inside.scope = getattr(_inside, "scope", None), self
            try:
                with self._settings.entered():
                    yield
            finally:
                _inside.scope = before

    @contextlib.contextmanager
    def _one_call(self) -> Iterator[None]:
        _inside.refused = None
        try:
            yield
        except BaseException as error:
            self.runtime.give_up_calls()
            refused, _inside.refused = _inside.refused, None
            if refused is not None and type(error) is RuntimeError:
                raise refused from error
            raise
        finally:
            self.runtime.end_events()


#: Runs a patched experts module: (module, x [T, H], ids [T, K], weights [T, K]) -> [T, H]; of a masked layer
#: (module, x [E*T, H]) -> [E*T, H].
RunExperts = Callable[..., Tensor]


class Link:
    """What an experts module needs to find its layer.

    `run` runs it where it is not being traced; `key` is the tensor by which the op `experts` finds the layer. With
    `whole`, the model's call is traced as one graph, experts included. `rows` is what a graph assumes of the rows
    (`graphs/ops.py: rows_of`): traced code hands it on, so that Dynamo guards on it. `name` is the layer's;
    `casts` says whether autocast converts what its experts compute with, `compiled` whether graphs go through Inductor.
    `refusing` is a key that leads to nothing but an error, for a trace must not raise.
    """

    def __init__(self, scope: Scope, run: RunExperts, whole: bool, rows: str, name: str, casts: bool, compiled: bool):
        self.scope, self.run, self.whole, self.key, self.rows = scope, run, whole, _CLOSED, rows
        self.name = name
        self.casts, self.compiled, self.refusing = casts, compiled, torch.empty(1, device="cpu")
        ops.bind(self.refusing, _Refusing(name))
        weakref.finalize(self, ops.unbind, self.refusing).atexit = False


def run_op(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run an experts module as the op `experts`, which is complete by itself: for calls that have no graph of ours."""
    link = module._moe_offload
    return ops.experts_op(x_TH, ids_TK, weights_TK, link.refusing if is_cast(link, x_TH) else link.key)


def is_cast(link: Link, x_TH: Tensor) -> bool:
    """Whether autocast is to convert, one by one, the operands of products that an op computes, where it sees none."""
    return link.casts and torch.is_autocast_enabled(x_TH.device.type)


def run_untraced(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As `run_op`, for eager code. Raises where a mode of the user's is on, which would see nothing inside the op."""
    refuse_unseen_modes(module)
    return run_op(module, x_TH, ids_TK, weights_TK)


class _Refusing:
    """What serves an op within autocast that cannot be exact there."""

    def __init__(self, name: str):
        self._name = name

    def experts(self, *_: Tensor) -> Tensor:
        raise UnsupportedModelError(
            f"{self._name}: within autocast the operands of its products are converted one by one, which is not done "
            "where experts are computed as one op (a torch.compile of your own, a dispatch mode, untraceable code) or "
            "through Inductor. Leave autocast, or choose config={'experts_implementation': 'grouped_mm'} on a CPU"
        )

    masked_experts = experts


class _Closed:
    """Takes the place of a closed model's layer: whatever a graph calls on it raises `ClosedError`."""

    def __getattr__(self, verb: str) -> Any:
        raise closed_error("this model")


_CLOSED = torch.empty(1, device="cpu")
ops.bind(_CLOSED, _Closed())


def connect_bank(layer: LayerRuntime) -> None:
    """Let the layer's modules and graphs use the bank it has now. Experts that are called see it by themselves."""
    if layer.moe.called:
        return
    ops.bind(layer.slots.bank_SN, layer)
    key = torch.empty(1, device=layer.slots.bank_SN.device)
    ops.bind(key, MaskedLayer(layer) if layer.moe.form == "masked" else layer)
    for module in layer.moe.modules:
        module._moe_offload.key = key


def disconnect_bank(layer: LayerRuntime) -> None:
    """Let go of the layer's bank, before its memory is given back."""
    if layer.moe.called:
        for module in layer.moe.modules:
            module._moe_offload.forget()
        return
    ops.unbind(layer.slots.bank_SN)
    for module in layer.moe.modules:
        if module._moe_offload.key is not _CLOSED:
            ops.unbind(module._moe_offload.key)
        module._moe_offload.key = _CLOSED
