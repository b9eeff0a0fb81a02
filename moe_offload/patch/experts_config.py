"""The configuration as the experts modules of an offloaded model see it: the model's own, but for one answer.

transformers asks `module.config._experts_implementation` what runs a module of experts. Ours must answer with our own
name; `model.config`, which other models are made from, must not. So these modules get a view of it: the same
attributes, in the same dictionary, and another answer to that one question.
"""

from __future__ import annotations

import copy
from typing import Any

from ..errors import OffloadError

KEY = "_experts_implementation"
CHANGED = (
    "the experts implementation of an offloaded model is fixed: another one cannot reach its weights, which are in "
    "slots. Choose it with config={'experts_implementation': ...} in optimize() or from_pretrained()"
)


def experts_view(config: Any, implementation: str) -> Any:
    """A view of `config` whose experts implementation is `implementation`, whatever `config` says."""
    own = type(config)

    def refuse(_: Any, value: Any) -> None:
        raise OffloadError(f"it was set to {value!r}, but {CHANGED}")

    def copy_plain(*_: Any) -> Any:
        return copy.copy, (config,)

    answers = {
        KEY: property(lambda _: implementation, refuse),
        "__reduce_ex__": copy_plain,
        "__module__": own.__module__,
    }
    view: Any = object.__new__(type(own.__name__, (own,), answers))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view
