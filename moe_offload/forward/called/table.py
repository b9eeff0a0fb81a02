"""What serves the forms whose experts are called or read one by one: a function a form, as `FORMS` finds them."""

from __future__ import annotations

from collections.abc import Callable

from ...runtime.layer import LayerRuntime
from ..binding import Scope
from .modules import serve_modules
from .rows import serve_rows
from .slots import SlotWeights

#: `{form: put phantoms in place of a layer's experts, and let its code run on the slots}`. Only the model's layer is
#: changed; what is returned is told to let go of the slots when the model is closed.
SERVED: dict[str, Callable[[LayerRuntime, Scope], SlotWeights]] = {
    "modules": serve_modules,
    "stacks": serve_rows,
    "lists": serve_rows,
}
