"""A rank whose program is over has said what the others wait for: they read it, however late they are."""

import json

import pytest

from moe_offload.errors import RankError
from moe_offload.ranks.group import Group
from moe_offload.ranks.orders import Orders


class Late:
    """A store in which one key is found at the second look only; none where `late` says nothing."""

    def __init__(self, late):
        self.values, self.late, self.looks = {}, late, 0

    def another(self):
        return self

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        if key in self.values:
            return self.values[key].encode()
        self.looks += 1
        return json.dumps(self.late).encode() if self.late and self.looks > 1 else None


class Watch:
    """Rank 1 is known to have ended, from the first look at the store on."""

    def __init__(self, store):
        self.store = store

    def find_ended(self, within_s=0.0):
        return (1, "has ended: its program is over") if self.store.looks else None

    def error(self, rank, how):
        return RankError(f"rank {rank} {how}")

    def check(self):
        if self.find_ended():
            raise self.error(*self.find_ended())


def group_of(store):
    group = Group.__new__(Group)
    group.rank, group.world, group.timeout_s, group.prefix = 0, 2, 60.0, "p"
    group.store, group.watch, group.names, group.failed, group._said = store, Watch(store), (), "", {}
    return group


WAITS = {
    "exchange": lambda group: group.exchange("x", "mine", "say x"),
    "order": lambda group: Orders(group, "x").take(),
}


@pytest.mark.parametrize(("wait", "found"), [("exchange", ["mine", "hers"]), ("order", "hers")])
def test_what_it_said_before_is_read(wait, found):
    assert WAITS[wait](group_of(Late("hers"))) == found


@pytest.mark.parametrize("wait", WAITS)
def test_what_it_did_not_say_is_its_end(wait):
    with pytest.raises(RankError, match="rank 1 has ended"):
        WAITS[wait](group_of(Late(None)))
