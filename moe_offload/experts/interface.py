"""The form "interface": stacked experts that dispatch through transformers' experts interface.

A module qualifies when it was decorated with `use_experts_implementation`: that is what makes its weights appear in a
traced graph as `W[ids]` or `grouped_mm(x, W, offs)`, the two forms the passes know.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .layer import MoELayer, Place
from .layout import RowLayout
from .names import TOP_K_NAMES, find_top_k
from .share import find_share, local_part

VECTOR_BYTES = 16  # of the narrowest vector register: MKL multiplies by whole ones, from a multiple of that on


def find_interface(model: nn.Module) -> list[MoELayer]:
    """The layers of this form, one for each distinct set of parameters.

    Raises `UnsupportedModelError`, naming the module, where one cannot be rewritten exactly.
    """
    found: dict[tuple[int, ...], list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            key = tuple(id(param) for param in stacked_params(name, module).values())
            found.setdefault(key, []).append((name, module))
    layers: list[MoELayer] = []
    for members in found.values():
        name, module = members[0]
        params = stacked_params(name, module)
        held = {field: local_part(param) for field, param in params.items()}
        num_experts = next(iter(held.values())).shape[0]
        top_k = find_top_k(name, module, model)
        if top_k is None:
            raise UnsupportedModelError(
                f"{name}: cannot tell how many experts a token uses; looked for {', '.join(TOP_K_NAMES)} on the "
                "module, its router and the configuration"
            )
        layout = RowLayout.of(held)
        if not module.is_transposed:
            _refuse_uneven(name, layout)
        layers.append(
            MoELayer(
                len(layers),
                tuple(n for n, _ in members),
                tuple(m for _, m in members),
                num_experts,
                min(top_k, num_experts),
                layout,
                layout,
                places=tuple(tuple(Place(m, field, field, field) for field in params) for _, m in members),
                share=find_share(name, module, params),
            )
        )
    return layers


def _refuse_uneven(name: str, layout: RowLayout) -> None:
    """Raise where the bits of a product would depend on which of the pairs are computed together: that decides where
    the hidden states of each begin."""
    for field in layout.fields:
        if field.is_placed and field.shape[-1] * field.dtype.itemsize % VECTOR_BYTES:
            raise UnsupportedModelError(
                f"{name}: its {field.name} is {field.dtype} with rows of {field.shape[-1]} numbers. The bits of such "
                f"products depend on where hidden states lie in memory, unless their rows are a multiple of "
                f"{VECTOR_BYTES} bytes, so they cannot be plain transformers'. Load the model in bfloat16"
            )


def is_experts(module: nn.Module) -> bool:
    """Whether `module` was decorated with transformers' `use_experts_implementation`."""
    return all(hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed"))


def stacked_params(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that routing selects from, `{name: [E, ...]}`; raises where the module cannot be rewritten."""
    wanted = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    if module.has_bias:
        wanted = [n for w in wanted for n in (w, f"{w}_bias")]
    params: dict[str, torch.Tensor] = {}
    for want in wanted:
        param = getattr(module, want, None)
        if not isinstance(param, torch.Tensor) or param.dim() < 2:
            raise UnsupportedModelError(
                f"{name}: expected a stacked parameter {want!r} of shape [experts, ...], found "
                f"{type(param).__name__}; {type(module).__name__} stores its experts in another way"
            )
        params[want] = param
    own = dict(module.named_parameters(recurse=False))
    extra = sorted(set(own) - set(wanted))
    if extra:
        raise UnsupportedModelError(
            f"{name}: has parameters {extra} besides {wanted}; a quantised or customised experts module is not "
            "supported yet (its scales would not move with its weights)"
        )
    sizes = {param.shape[0] for param in params.values()}
    if len(sizes) != 1:
        raise UnsupportedModelError(f"{name}: its stacked parameters disagree on the number of experts: {sizes}")
    return params
