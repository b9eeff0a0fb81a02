"""Experts that are all multiplied with all tokens, zeros where the router did not send one: the masked form.

Shapes: T tokens, E experts, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class MaskedExperts(nn.Module):
    """x [E*T, H], expert after expert -> [E*T, H]."""

    def __init__(self, num_experts: int, hidden: int, inner: int, turned: bool = False):
        super().__init__()
        up, down = (hidden, 2 * inner), (inner, hidden)
        self.turned, self.hidden = turned, hidden
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, *(up[::-1] if turned else up)))
        self.down_proj = nn.Parameter(torch.randn(num_experts, *(down[::-1] if turned else down)))

    def forward(self, x: Tensor) -> Tensor:
        x_ETH = x.view(len(self.gate_up_proj), -1, self.hidden)
        up, down = (w.transpose(1, 2) if self.turned else w for w in (self.gate_up_proj, self.down_proj))
        return torch.bmm(self.combine(torch.bmm(x_ETH, up)), down).view(-1, self.hidden)

    def combine(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return up * functional.silu(gate)


class MaskedBlock(nn.Module):
    """Top-k routing in front of them, and the sum over all experts behind."""

    def __init__(self, experts: MaskedExperts, top_k: int):
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = nn.Parameter(torch.randn(len(experts.gate_up_proj), experts.hidden))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        logits_TE = hidden_TH @ self.router.t()
        values, ids = logits_TE.topk(self.top_k)
        scores_TE = torch.full_like(logits_TE, float("-inf")).scatter(1, ids, values).sigmoid()
        masked = hidden_TH.repeat(scores_TE.shape[1], 1) * scores_TE.t().reshape(-1, 1)
        return self.experts(masked).view(scores_TE.shape[1], -1, hidden_TH.shape[1]).sum(0)


def make_masked(
    dtype: torch.dtype = torch.float32,
    *,
    num_experts: int = 8,
    hidden: int = 16,
    inner: int = 24,
    top_k: int = 1,
    turned: bool = False,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> MaskedBlock:
    """`combine` takes the place of what lies between the products."""
    torch.manual_seed(0)
    experts = MaskedExperts(num_experts, hidden, inner, turned)
    if combine is not None:
        experts.combine = combine  # type: ignore[method-assign]
    return MaskedBlock(experts, top_k).to(dtype).requires_grad_(False)
