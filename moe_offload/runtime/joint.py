"""One event of a layer for several requests, each of which computes alone: what they ask for is looked up together.

    begin      the cache names slots for the union of their experts, and all that is missing begins to load; who waits
               for the fewest rows computes first, and its rows load first
    compute    one request after the other: its resident pairs, then those of its rows as they arrive
    end        what is left is given up: some request has failed before it came here

No request's products see another's rows, so each has the bits it would have alone; what they share is the reading.
Whoever finds that a row of its own is neither here nor on its way (another request has failed, and with it the reads)
asks for itself, as if it were alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import RoutingError
from .in_flight import Arrivals
from .waves_cpu import RunCore, compute_while_loading

logger = logging.getLogger("moe_offload")


class Joint:
    """The event of several requests in one layer, `begun` from `begin` to `end`. The host decides, on a CPU."""

    def __init__(self, arrivals: Arrivals):
        self._arrivals, self.begun = arrivals, False
        #: Whether products of so many requests at once have the bits of each alone; set where the model is patched.
        self.shares_products: Callable[[int], bool] = lambda requests: False

    def begin(self, asked: Sequence[list[int]]) -> list[int]:
        """Begin one event of as many of the first requests as have room together; `asked` are the expert ids of each,
        which are those of one token.

        Returns which those are, in the order in which they are to compute. [0], with nothing begun, for a request that
        is to be served alone: there is no room for the next, its ids are wrong, or nothing can be read, and it will be
        told so itself.
        """
        arrivals, cache = self._arrivals, self._arrivals.cache
        used, each = Counter[int](), list[Counter[int]]()
        for _, own in map(arrivals.moe.own_uses, asked):
            try:
                cache.check(own)
            except RoutingError:
                break
            if len(used | own) > cache.slots:
                break
            used = used + own
            each.append(own)
        if len(each) < 2:
            return [0]
        try:
            arrivals.begin(used)
            loads = cache.lookup(used, tokens=len(each))
            arrivals.claim_guesses(used)
            missing = {load.expert for load in loads}
            order = sorted(range(len(each)), key=lambda i: len(missing & each[i].keys()))
            turn = {e: n for n, i in reversed(list(enumerate(order))) for e in each[i]}  # of who is first to need it
            arrivals.start(sorted(loads, key=lambda load: turn[load.expert]))
        except Exception as error:
            arrivals.abort()
            logger.debug("%s: %d requests ask one after the other: %s", arrivals.moe.name, len(each), error)
            return [0]
        except BaseException:
            arrivals.abort()
            raise
        self.begun = True
        return order

    def compute(self, x_P: Tensor, ids_P: Tensor, core: RunCore, others: Sequence[Tensor]) -> Tensor | None:
        """The result of every pair of one of the requests; None where it has to ask for itself."""
        arrivals, cache = self._arrivals, self._arrivals.cache
        ids, used = arrivals.moe.own_uses(ids_P.tolist())
        awaited = {arrival.expert for arrival in arrivals.awaited}
        if any(not 0 <= e < cache.num_experts or (cache.slot_of[e] < 0 and e not in awaited) for e in used):
            return None
        if awaited.isdisjoint(used) and sum(used.values()) == len(ids):
            slots_P = torch.tensor([cache.slot_of[e] for e in ids], dtype=ids_P.dtype, device="cpu")
            return core(x_P, slots_P, arrivals.slots.bank_SN, others)
        try:
            return compute_while_loading(arrivals, None, x_P, torch.tensor(ids, device="cpu"), core, others, (), used)
        except Exception as error:  # perhaps of a row that only another request needs; if not, it comes again
            arrivals.abort()
            logger.debug("%s: a request asks again, alone: %s", arrivals.moe.name, error)
            return None

    def end(self) -> None:
        if self.begun:
            self.begun = False
            self._arrivals.abort_interrupted()
