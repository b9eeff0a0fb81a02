"""A model whose class comes with the checkpoint: built with parameters that have no bytes yet, and real buffers.

transformers (5.23) builds every model on the meta device and knows how to make anew what its own classes compute in
`__init__` and keep in no file (rotary frequencies, masks). Of other classes it leaves that undefined: such a model
says nonsense. So here the class is built on the CPU, as by calling it, and only its parameters go to the meta device,
each as soon as its module has it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...experts import PLACED
from .remote_code import FAILURES, failed

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedModel

#: The package in which transformers puts such code.
DYNAMIC = "transformers_modules"
_ONE_AT_A_TIME = threading.Lock()  # a method of a class is replaced meanwhile


def build_own(place: Path | str, model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its parameters on the meta device. Raises `UnsupportedModelError` where its code fails."""
    try:
        with _parameters_on_meta():
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    except FAILURES as error:
        raise failed(place, f"{model_class.__module__}.{model_class.__name__}", error) from error
    model.eval()
    return model


def is_own(model: Any) -> bool:
    """Whether the class of `model` comes with a checkpoint."""
    return type(model).__module__.partition(".")[0] == DYNAMIC


def load_own(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put `tensors` (by name) into a model that `build_own` made, as its load_state_dict would.

    Each keeps the dtype that its class has made it in. Raises `CheckpointError` for a tensor of another shape.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, param in module._parameters.items():
            if param is not None:
                places.setdefault(id(param), []).append((module, attribute))
    names = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in tensors:
        held = names[name]
        if held.shape != tensor.shape:
            raise CheckpointError(
                f"{name}: the checkpoint has it as {list(tensor.shape)}, the model's own code as {list(held.shape)}. "
                "Use the checkpoint that belongs to this configuration"
            )
        if not isinstance(held, nn.Parameter):
            held.copy_(tensor)
        elif held.is_meta:
            # As load_state_dict() does, into memory of torch's, whose beginning decides about the bits of a product.
            loaded = nn.Parameter(tensor.to(held.dtype, copy=held.dtype in PLACED), requires_grad=held.requires_grad)
            for module, attribute in places.pop(id(held), ()):  # tied: under the first of its names
                module._parameters[attribute] = loaded
        else:
            held.data.copy_(tensor)
    _tie_head(model)


def _tie_head(model: Any) -> None:
    """Where the configuration ties the head to the embeddings, older code leaves it to the loader."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    try:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:  # the class does not say which they are: what is missing then is refused by name
        return
    if head is not None and embeddings is not None and head.weight.is_meta:
        head.weight = embeddings.weight


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Meanwhile every parameter that this thread gives to a module loses its bytes."""
    thread, register = threading.get_ident(), nn.Module.register_parameter
    owner: Any = nn.Module

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if threading.get_ident() == thread and type(param) is nn.Parameter and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    with _ONE_AT_A_TIME:
        owner.register_parameter = register_empty
        try:
            yield
        finally:
            owner.register_parameter = register
