"""Rank 0 holds the store in which the ranks meet, and is stopped: the others end, and say that it was rank 0."""

import pytest

from tests.fakes.ranks import Ranks

MOST_S = 30


@pytest.fixture
def own_pair(capfd):
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_a_rank_that_waits_in_a_collective_is_ended(own_pair, capfd):
    own_pair.tell("rank_0_stops", within_call=True)
    assert own_pair.answer(1, MOST_S) is None, "its process has ended"
    told = capfd.readouterr().err
    assert "moe_offload: rank 0 (process" in told and "does not answer" in told


def test_a_rank_that_asks_the_store_raises(own_pair):
    own_pair.tell("rank_0_stops", within_call=False)
    for error in own_pair.answer(1, MOST_S)["value"]:
        assert error.startswith("RankError: rank 0 (process") and "does not answer" in error


def test_a_rank_that_comes_later_gives_up(own_pair):
    own_pair.tell("rank_0_is_stopped_before")
    error = own_pair.answer(1, MOST_S)["value"]
    assert error.startswith("ConfigError: rank 1 of 2 could not form a group") and "where rank 0 is" in error
