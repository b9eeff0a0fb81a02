"""torch's own check of every op: its schema tells what it writes to, its fake looks like the real result, and traced by
AOTAutograd it computes the same.

`opcheck` copies the arguments, and an op finds its layer by where its bank is: so here every tensor leads to one that
serves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from passes import ops

T, K, E, S, H, O = 3, 2, 5, 4, 8, 6  # noqa: E741  tokens, experts of each, experts, slots, hidden, outputs
RAISE = {"unserved", "no_gradient"}  # by design, whatever they are given


class Served:
    """Serves as the runtime does: slots in order, a bank that is written to, results that depend on what came in."""

    def __init__(self, bank):
        self.bank = bank

    def fetch(self, ids_P):
        self.bank.add_(1)
        return ids_P.flatten().clone().view(ids_P.shape) % S

    def place(self, ids_P):
        return self.fetch(ids_P).to(torch.int64)

    def place_top(self, scores_TE, k):
        values_TK, ids_TK = torch.topk(scores_TE, k)
        return values_TK, ids_TK, self.place(ids_TK.flatten())

    def wait(self, slots_P):
        self.bank.add_(1)
        return slots_P.clone()

    def prefetch(self, ids_P):
        self.bank.add_(1)

    def place_ahead(self, ids_P, slots_Q):
        self.bank.add_(1)
        return slots_Q.clone()

    def observe(self, ids_P):
        pass

    def stream(self, x_P, ids_P, core, others):
        self.bank.add_(1)
        return x_P.reshape(-1, H)[: len(ids_P), :O] * 2 + ids_P.unsqueeze(1) % 2

    def experts(self, x_TH, ids_TK, weights_TK):
        return x_TH * weights_TK.sum(1, keepdim=True)

    def masked_experts(self, x_MH):
        return torch.empty_like(x_MH).copy_(x_MH * 2)


@dataclass(frozen=True)
class Doubled:
    """A packed weight that is the first bytes of a row, doubled."""

    shape = (H, O)
    dtype = torch.float32

    def unpack(self, row, out):
        out.copy_(2.0 * row[: H * O].view(H, O))

    def multiply(self, x_PI, rows_SB, runs, out_PO, transposed):
        for slot, begin, end in runs:
            weight = 2.0 * rows_SB[slot][: H * O].view(H, O)
            torch.mm(x_PI[begin:end], weight.T if transposed else weight, out=out_PO[begin:end])


@pytest.fixture(autouse=True)
def served(monkeypatch):
    monkeypatch.setattr(ops, "_server_of", Served)
    monkeypatch.setattr(ops, "_CORES", [SimpleNamespace(key="a core")])
    monkeypatch.setattr(ops, "_PACKED", [Doubled()])


def samples(turned):
    """Arguments of every op; with `turned`, tensors that lie in memory the other way round."""

    def lay(x):
        return x.T.contiguous().T if turned and x.dim() == 2 else x

    ids, bank, x = lay(torch.arange(T * K).view(T, K) % E), torch.zeros(S, 64), lay(torch.rand(T * K, H))
    pairs, weight = ids.flatten() % S, torch.rand(S, H, O)
    packed = torch.randint(0, 9, (S, 64), dtype=torch.uint8)
    masked = torch.rand(E, T, H) * (torch.arange(T * E).view(E, T, 1) % 2)
    return {
        "fetch": (ids, bank),
        "place": (ids, bank),
        "place_top": (lay(torch.rand(T, E)), K, bank),
        "place_ahead": (ids, lay(ids + 1), bank),
        "wait": (ids, bank),
        "prefetch": (ids, bank),
        "stream": (x, pairs, bank, [torch.rand(H)], 0, [O], torch.float32),
        "stream_masked": (masked, bank, 0, O, torch.float32),
        "grouped_mm": (x, weight.transpose(1, 2).contiguous().transpose(1, 2) if turned else weight, pairs),
        "gated_mm": (x, weight, pairs),
        "fast_grouped_mm": (x, weight, pairs),
        "packed_mm": (x, packed, pairs, 0, False),
        "packed_gated_mm": (x, packed, pairs, 0, False),
        "unpack": (packed, pairs, 0),
        "observe": (ids, bank),
        "observe_masked": (masked, bank),
        "experts": (lay(torch.rand(T, H)), ids, lay(torch.rand(T, K)), torch.zeros(1)),
        "masked_experts": (lay(torch.rand(T * E, H)), torch.zeros(1)),
    }


def test_no_op_is_left_out():
    defined = {op.partition("::")[2] for op in torch._C._dispatch_get_all_op_names() if op.startswith("moe_offload::")}
    assert {name.partition(".")[0] for name in defined} == set(samples(False)) | RAISE


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "turned"])
@pytest.mark.parametrize("name", samples(False))
def test_what_a_compiler_is_told_of_an_op_is_so(name, turned):
    opcheck(getattr(torch.ops.moe_offload, name).default, samples(turned)[name])


@pytest.mark.parametrize("fault", ["strides", "dtype"])
def test_it_would_be_seen(fault, monkeypatch):
    wrong = {"strides": lambda ids: ids.T.contiguous().T % S, "dtype": lambda ids: (ids % S).to(torch.int32)}[fault]
    monkeypatch.setattr(Served, "fetch", lambda self, ids_P: wrong(ids_P))
    with pytest.raises(Exception, match=r"(?i)stride|dtype"):
        opcheck(ops.fetch, samples(False)["fetch"], test_utils="test_faketensor")
