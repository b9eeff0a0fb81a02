"""Why a model has no experts that can be offloaded: which module really holds them, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# The names under which configurations keep E. They are used for the words of a refusal alone.
NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
LISTS = (nn.ModuleList, nn.ModuleDict)
PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)


def explain_none(model: nn.Module) -> str:
    """Say what kind of MoE layer the model has, if any, and which form its experts have that is not supported."""
    for name, reason in _unsupported_moe(model):
        return f"{type(model).__name__}: {name} {reason}, a form in which experts cannot be offloaded yet"
    return (
        f"{type(model).__name__} has no routed experts: no module dispatches through transformers' experts interface "
        "(use_experts_implementation), and none is a list of modules called experts. moe_offload helps "
        "Mixture-of-Experts models only"
    )


def _unsupported_moe(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules that hold experts in another form than `FORMS` knows; lists first: beside them lie routers and biases."""
    said = [(name, module) for name, module in model.named_modules() if _says_moe(name, module)]
    for describe in (_describe_list, _describe_parameter_lists, _describe_stack, _describe_embeddings):
        for name, module in said:
            reason = describe(module, _num_experts(model))
            if reason:
                yield name, f"({type(module).__name__}) {reason}"


def _says_moe(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "expert" in f"{name.rpartition('.')[2]} {kind}".lower() or "moe" in kind


def _describe_list(module: nn.Module, num_experts: int | None) -> str:
    if not isinstance(module, LISTS) or len(module) < 2:
        return ""
    members = list(module.children())
    if not any(any(True for _ in member.parameters()) for member in members):
        held = any(buffer.dim() > 1 for member in members for buffer in member.buffers())
        return f"keeps the weights of its {len(module)} experts in buffers, as quantised modules do" if held else ""
    kinds = sorted({type(member).__name__ for member in members})
    return (
        f"keeps its {len(module)} experts in modules that are not alike or hold lists of their own ({', '.join(kinds)})"
    )


def _describe_parameter_lists(module: nn.Module, num_experts: int | None) -> str:
    lists = [name for name, child in module.named_children() if isinstance(child, PARAMETER_LISTS) and len(child) > 1]
    return f"keeps its experts in lists of parameters that are not alike ({', '.join(lists)})" if lists else ""


def _describe_stack(module: nn.Module, num_experts: int | None) -> str:
    stacks = [name for name, param in module.named_parameters(recurse=False) if _is_stack(param, num_experts)]
    if not stacks or isinstance(module, nn.Embedding):
        return ""
    return f"stacks its experts ({', '.join(stacks)}), and neither its name nor a number says that it does"


def _is_stack(param: Tensor, num_experts: int | None) -> bool:
    """A stack `[E, ...]` of matrices, or all of them below each other; not a router [E, H], nor a bias [1, E]."""
    if param.dim() > 2:
        return param.shape[0] > 1
    if param.dim() < 2 or num_experts is None:
        return False
    return 1 < num_experts < param.shape[0] and param.shape[0] % num_experts == 0


def _describe_embeddings(module: nn.Module, num_experts: int | None) -> str:
    rows = sum(isinstance(child, nn.Embedding) for child in module.children())
    return "keeps its experts as rows of nn.Embedding, outside transformers' experts interface" if rows > 1 else ""


def _num_experts(model: Any) -> int | None:
    config = getattr(model, "config", None)
    for name in NUM_EXPERTS_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
