"""What goes through the scratch rows during one event, with arrivals that only note what they are asked for."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

from moe_offload.runtime.ahead.scratch_feed import Feed


def test_scratch_that_holds_a_row_is_not_filled_with_another():
    """Rows 0 and 2 are on their way, one claimed and not yet demanded, one demanded: they write there."""
    sent = []
    arrivals = SimpleNamespace(
        held={7: SimpleNamespace(scratch_row=0)},
        awaited=deque([SimpleNamespace(scratch_row=2), SimpleNamespace(scratch_row=-1)]),
        scratch_rows=SimpleNamespace(rows=[None] * 4),
        send=lambda expert, load, scratch_row: sent.append((expert, load, scratch_row)),
    )
    feed = Feed(arrivals, None, pairs=8, without_slot=[4, 5, 6])
    feed.fill()
    assert sent == [(4, None, 1), (5, None, 3)] and list(feed.without_slot) == [6]
