"""Ranks that do not run the same are named, with what differs; budgets may differ, and memory is shared evenly."""

from pathlib import Path

import pytest

from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.pretrained.split import split_outline
from moe_offload.config.settings import OffloadConfig
from moe_offload.memory import locking
from moe_offload.memory.machine import Memory
from moe_offload.plan import arrange
from moe_offload.plan.prepare import prepare_model
from moe_offload.ranks.join import config_of_ranks
from moe_offload.ranks.pretend import pretended_rank

MB = 10**6


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The same model, in files of another layout."""
    path = tmp_path_factory.mktemp("other") / "qwen"
    build("qwen3_moe", num_hidden_layers=2).save_pretrained(path, max_shard_size="100KB")
    return str(path)


def test_what_a_rank_has_otherwise_is_named_and_may_be_mended(pair, folder, other):
    for refused, _ in pair.run("runs_something_else", folder=folder, other=other):
        version, checkpoint, setting, budgets = refused
        for error, what in ((version, "moe-offload"), (checkpoint, "checkpoint"), (setting, "compute packed")):
            assert error.startswith("RankError: rank 1 (process") and what in error and "rank 0 (process" in error
        assert "names 3 budgets, and there are 2 processes" in budgets


def test_budgets_are_of_each_rank(pair, folder, other):
    found = [budgets for _, budgets in pair.run("runs_something_else", folder=folder, other=other)]
    assert found == [[30 * MB, 20 * MB, 40 * MB], [31 * MB, 21 * MB, 41 * MB]]


@pytest.mark.parametrize(("budget", "locked"), [("21MB", False), ("29MB", True)])
def test_slots_are_locked_where_the_ranks_together_have_most_of_the_machine(monkeypatch, folder, budget, locked):
    """Of 100 MB each of two has 50: above 25 MB they lock what one process would above 50."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(arrange, "main_memory", lambda: Memory(100 * MB, 100 * MB))
    monkeypatch.setattr(locking, "allowed_bytes", lambda: 10**12)
    with pretended_rank(1, 2):
        outline = split_outline(outline_folder(Path(folder)), config_of_ranks(2))
        prepared = prepare_model(outline.model, outline.moe_layers, OffloadConfig(budget=budget, profile="off"))
    assert (prepared.lock_bytes > 0) == locked
