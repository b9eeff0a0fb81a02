"""transformers' own experts code on the rows of a bank: what the op of last resort computes with.

Shapes: P token-expert pairs, R of them in one wave, S slots, N elements of one row.

An elementwise kernel rounds the end of a tensor, which does not fill a vector register, otherwise than the rest (see
`passes/core_graph.py`). Where a pair's share of a tensor does not fill whole vectors, the code is given all pairs for
each expert, each pair in the place that it has in the whole call, and the expert's own are kept. Tiny models have such
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..experts import MoELayer
from ..forward.changed_parts import refuse_changed_parts
from ..forward.graphs.ops import fills_vectors
from ..memory.buffers import page_aligned


class ModuleCore:
    """transformers' own experts code, run for single pairs (K = 1) on the rows of a bank.

    Routing weights of one leave the pairs unweighted: the weighted sum over K is taken after all waves.
    """

    def __init__(self, moe: MoELayer, implementation: str, views: Callable[[Tensor], dict[str, Tensor]]):
        self.moe, self.module, self.views = moe, moe.modules[0], views
        self.run, self.grouped = original_code(implementation), implementation == "grouped_mm"
        self.pairs_independent = fills_vectors(moe)

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        """The pairs of grouped code are sorted by expert, as it has them in the whole call."""
        refuse_changed_parts(self.module)
        if not self.pairs_independent:
            return self._run_in_place(x_P, slots_R, bank_SN, pairs_R)
        # A batched product of one pair rounds otherwise than that of many, among which it is in the whole call.
        least = 1 if self.grouped else min(len(x_P), 2)
        if pairs_R is not None:
            x_P = x_P[pairs_R]
        if self.moe.packed:
            return self._run_unpacked(x_P, slots_R, bank_SN, least)
        return self._run_many(x_P, slots_R, self.views(bank_SN), least)

    def _run_many(self, x_P: Tensor, slots_P: Tensor, weights: dict[str, Tensor], least: int) -> Tensor:
        """Of `least` pairs or more; where there are fewer, one of them more often."""
        pairs = len(x_P)
        if 0 < pairs < least:
            x_P, slots_P = x_P.repeat(least, 1), slots_P.repeat(least)
        return self._run(x_P, slots_P, weights)[:pairs]

    def _run(self, x_P: Tensor, slots_P: Tensor, weights: dict[str, Tensor]) -> Tensor:
        bare = object.__new__(type(self.module))
        bare.__dict__.update(self.module.__dict__)
        bare.__dict__["_parameters"] = {**self.module._parameters, **weights}
        first = next(iter(weights.values()))
        bare.__dict__["num_experts"] = first.shape[0]
        ones = torch.ones((len(x_P), 1), dtype=first.dtype, device=x_P.device)
        out: Tensor = self.run(bare, x_P.to(first.dtype), slots_P.view(-1, 1), ones)
        return out

    def _run_in_place(self, x_P: Tensor, slots_R: Tensor, bank_SN: Tensor, pairs_R: Tensor | slice | None) -> Tensor:
        """One expert after the other, and all pairs for each: those before its own and after them as groups of their
        own, so that its matrix products have its own rows and no others."""
        places_P = torch.arange(len(x_P), device=x_P.device)
        places_R = places_P if pairs_R is None else places_P[pairs_R]
        outs: list[Tensor] = []
        for mine, weights in self._each_expert(slots_R, bank_SN):
            places = places_R[mine]
            if self.grouped:
                groups_P = (places_P >= places[0]).long() + (places_P > places[-1])
                order_P = groups_P.sort().indices  # as the code sorts them: equal ones may change places
                weights = {name: weight.expand(3, *weight.shape[1:]) for name, weight in weights.items()}
                out_P = self._run(torch.empty_like(x_P).index_copy_(0, order_P, x_P), groups_P, weights)[order_P]
            else:
                out_P = self._run(x_P, torch.zeros_like(places_P), weights)
            outs.append(out_P[places])
        return _put_back(outs, slots_R)

    def _run_unpacked(self, x_P: Tensor, slots_P: Tensor, bank_SN: Tensor, least: int) -> Tensor:
        """One expert after the other, so that one is unpacked at a time."""
        outs = [
            self._run_many(x_P[mine], torch.zeros_like(mine), weights, least)
            for mine, weights in self._each_expert(slots_P, bank_SN)
        ]
        return _put_back(outs, slots_P)

    def _each_expert(self, slots_R: Tensor, bank_SN: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Which of the R pairs are those of one expert, and its weights [1, ...], which last until the next."""
        row = None
        if self.moe.packed:
            nbytes, on_cpu = self.moe.unpacked.row_bytes, bank_SN.device.type == "cpu"
            row = page_aligned(nbytes) if on_cpu else bank_SN.new_empty(nbytes, dtype=torch.uint8)
        for slot in slots_R.unique().tolist():
            mine = (slots_R == slot).nonzero().flatten()
            if row is None:
                yield mine, self.views(bank_SN[slot : slot + 1])
                continue
            self.moe.unpack_row(bank_SN[slot].view(torch.uint8), row)
            yield mine, {field.name: field.view_in(row)[None] for field in self.moe.unpacked.fields}


def _put_back(outs: Sequence[Tensor], slots_R: Tensor) -> Tensor:
    """The results of one expert after the other, in the order of the pairs."""
    order_R = slots_R.argsort(stable=True)
    out = torch.cat(list(outs))
    return torch.empty_like(out).index_copy_(0, order_R, out)


def original_code(implementation: str) -> Callable[..., Tensor]:
    """transformers' own experts code of that name: (module, x [T, H], ids [T, K], weights [T, K]) -> [T, H]."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    code: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS[implementation]
    return code
