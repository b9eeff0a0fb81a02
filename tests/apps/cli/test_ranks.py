"""Commands where several processes share a model: what each would hold, who speaks, and what is refused by name."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.families.tiny import build
from moe_offload.apps.generate.on_ranks import refuse_for_ranks
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.pretrained.split import split_outline
from moe_offload.errors import ConfigError
from moe_offload.ranks.join import config_of_ranks
from moe_offload.ranks.pretend import pretended_rank
from tests.paths import MODEL_NAME as MODEL


def run(*words):
    return CliRunner().invoke(app, [*words])


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def plans(*words):
    told = run("plan", MODEL, *words, "--json")
    assert told.exit_code in (0, 3), told.output
    return json.loads(told.stdout)


def test_each_rank_holds_its_share_and_needs_less():
    alone, found = plans("--budget", "6MB"), plans("--budget", "6MB", "--ranks", "2")
    assert found["fits"] and len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert rank["experts"] == [experts // 2 for experts in alone["experts"]]
        assert rank["floor"] < alone["floor"] and rank["row_bytes"] == alone["row_bytes"]
        assert rank["slots"] >= alone["slots"]


def test_budgets_by_commas_are_one_for_each_rank():
    found = plans("--budget", "6MB, 7MB", "--ranks", "2")["ranks"]
    assert [rank["budget"] for rank in found] == [6_000_000, 7_000_000]
    told = run("plan", MODEL, "--budget", "6MB,7MB", "--ranks", "2").stdout
    assert "rank 0:\n" in told and "rank 1:\n" in told
    assert run("plan", MODEL, "--budget", "6MB", "--ranks", "2").stdout.startswith("each of 2 ranks:\n")
    wrong = run("plan", MODEL, "--budget", "6MB,7MB,8MB", "--ranks", "2")
    assert wrong.exit_code == 2 and "3 budgets for 2 ranks" in wrong.stderr


def test_the_rank_whose_budget_is_too_small_is_named():
    found = plans("--budget", "6MB,4MB", "--ranks", "2")
    assert not found["fits"] and found["rank"] == 1 and found["budget"] == 4_000_000 < found["floor"]
    assert "rank 1 of 2" in found["error"]["message"] and found["error"]["type"] == "BudgetError"


def test_experts_that_do_not_go_evenly_over_the_ranks_are_refused():
    told = run("plan", MODEL, "--budget", "6MB", "--ranks", "3")
    assert told.exit_code == 2 and "64 experts across 3" in told.stderr.splitlines()[-1]


def test_attention_is_whole_where_heads_do_not_go_evenly_over_the_ranks():
    """The model has two heads of keys and values: four ranks hold more than half of what two do."""
    split, whole = (plans("--budget", "6MB", "--ranks", n)["ranks"][0]["bytes"] for n in ("2", "4"))
    assert whole["dense_weights"] > 0.75 * split["dense_weights"]


def test_attention_that_no_rule_splits_needs_no_rule(tmp_path):
    """gpt-oss has no tp_plan but that of the output weights; two heads of keys and values do not go over four ranks."""
    build("gpt_oss").save_pretrained(tmp_path)
    outline = outline_folder(tmp_path)
    with pretended_rank(0, 4):
        found = split_outline(outline, config_of_ranks(4, outline.model.config))
    assert [moe.num_experts for moe in found.moe_layers] == [2, 2, 2]


def test_heads_that_a_rank_would_have_a_part_of_are_refused():
    outline = outline_folder(Path(MODEL))
    with pretended_rank(0, 4), pytest.raises(ConfigError, match="2 heads do not go evenly over 4 ranks"):
        split_outline(outline, {"tp_size": 4, "ep_size": 4})


@pytest.mark.parametrize("words", [["chat", MODEL], ["bench", MODEL], ["env"], ["profile", "inspect", "x.json"]])
def test_what_is_for_one_process_is_refused_by_name(second_of_two, words):
    told = run(*words)
    assert told.exit_code == 2 and told.stdout == ""
    assert f"rank 1: moe-offload {' '.join(words[:-1] or words)} is for one process, and 2 were started" in told.stderr
    assert ("`run` says at its end what several ranks reach" in told.stderr) == (words[0] == "bench")


def test_the_first_rank_alone_tells_the_plan(second_of_two, monkeypatch):
    assert run("plan", MODEL, "--budget", "6MB").output == ""
    monkeypatch.setenv("RANK", "0")
    assert run("plan", MODEL, "--budget", "6MB").stdout.startswith("each of 2 ranks:\n")
    wrong = run("plan", MODEL, "--budget", "6MB", "--ranks", "4")
    assert wrong.exit_code == 2 and "2 processes were started" in wrong.stderr


@pytest.mark.parametrize("flags", [{"prompt": "-"}, {"save_trace": "x.npz"}, {"save_report": "x.json"}])
def test_flags_of_run_that_ranks_cannot_honour(second_of_two, flags):
    with pytest.raises(ConfigError, match=next(iter(flags)).replace("_", "-")):
        refuse_for_ranks(**flags)


def test_an_environment_that_makes_no_rank_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = run("plan", MODEL)
    assert told.exit_code == 2 and "RANK='2'" in told.stderr and told.stderr.count("\n") == 1
