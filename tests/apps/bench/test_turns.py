"""The order of a bench, and what comes of it: with sides that are made up, on a GPU that is made up."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from moe_offload.apps.bench import run
from moe_offload.apps.bench.devices import Cuda
from moe_offload.apps.bench.result import _belady
from moe_offload.apps.bench.sides import turns
from moe_offload.apps.bench.sides.child import SideFailed
from moe_offload.apps.bench.table import format_table
from moe_offload.apps.bench.workload import Measured, Workload
from moe_offload.checkpoint.pretrained.weight_files import WeightFiles
from moe_offload.plan.budget import Costs, LayerShape, budget_for, plan_slots

LINK = 1e9  # bytes per second
SHAPES, COSTS = [LayerShape(8, 2, 4096)] * 2, Costs(dense_bytes=1000, reserve_bytes=0)
#: Seconds of a token and of a prompt, and bytes of each.
SPEEDS = {
    "resident": (0.010, 0.1, 0, 0),
    "ours": (0.020, 0.4, 15e6, 200e6),
    "ours-host": (0.050, 0.4, 15e6, 200e6),
    "accelerate": (0.400, 4.0, 0, 0),
}


class FakeChild:
    """Answers as a side would, at the speed of `SPEEDS`."""

    baseline_bytes, limited, peak_with_cache_bytes = 0, "no limit", None

    def __init__(self, side, settings, limit_bytes):
        assert limit_bytes is None and settings["device"] == "cuda"
        self.side, self.budget, self.log = side, settings["budget"], FakeChild.log
        self.log.append(f"{side} starts")

    def do(self, what, **asked):
        if (self.side, what) == FakeChild.fails:
            raise SideFailed(f"{self.side}: out of memory")
        if what == "load":
            return {"load_s": 3.0, "routing": None, "slots": [4, 4]}
        if what == "memory":
            return {"peak_bytes": self.budget - 1, "reserved_bytes": self.budget}
        self.log.append(f"{self.side} {len(asked['prompt'])}+{asked['new_tokens']}")
        token_s, ttft_s, token_bytes, prompt_bytes = SPEEDS[self.side]
        counted = asked["new_tokens"] - asked["left_out"]
        tokens = list(range(asked["new_tokens"] + 1))
        if self.side == "accelerate":
            tokens[2:] = [-1] * len(tokens[2:])
        events = [[0, 1, 2, 3, 4], *([[0, 1]] * asked["new_tokens"])]
        return {
            "ttft_s": ttft_s,
            "decode_s": token_s * counted,
            "tokens": tokens,
            "left_out": asked["left_out"],
            "prefill": {"hits": 0, "misses": 5, "bytes_read": prompt_bytes, "stall_s": 0},
            "decode": {"hits": 3, "misses": 1, "bytes_read": token_bytes * counted, "stall_s": 0},
            "used": [events, events],
            "peaks_bytes": [2 * self.budget, 10, self.budget - 1],
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append(f"{self.side} ends")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU with 100 GB; a checkpoint of 5 kB."""
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    monkeypatch.setattr(FakeChild, "log", [], raising=False)
    monkeypatch.setattr(FakeChild, "fails", None, raising=False)
    monkeypatch.setattr(turns, "Child", FakeChild)
    monkeypatch.setattr(run, "weight_files", lambda folder: WeightFiles((folder / "model.safetensors",)))
    roof = SimpleNamespace(
        measure=lambda seed: LINK,
        details=lambda: {"copy_engine_bytes_per_s": LINK, "kernel_bytes_per_s": LINK / 2},
    )
    monkeypatch.setattr(run, "link_roof", lambda row_bytes, device: contextlib.nullcontext(roof))
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 80 * 10**9, "triton": "3.6.0", "cuda": "13.0"}
    for name, value in (("check", None), ("room_bytes", 100 * 10**9), ("facts", facts)):
        monkeypatch.setattr(Cuda, name, lambda self, value=value: value)
    return tmp_path


def work(folder, *shares):
    plans = {f"{share:.0%}": plan_slots(budget_for(share, SHAPES, COSTS), SHAPES, COSTS) for share in shares}
    return Workload(folder, plans, 100, "cuda", prompt_tokens=20, new_tokens=32, requests=2)


def bench(folder, sides, *shares, keep=lambda result: None):
    return run.run_bench(work(folder, *shares), sides, folder, lambda line: None, keep)


def test_the_resident_model_is_loaded_once_and_takes_turns_with_each_residency(gpu):
    result = bench(gpu, ["resident", "ours", "ours-host@50%", "accelerate@25%"], 0.5, 0.25)
    ask, starts = "{} 20+32".format, "{} starts".format
    pair = [ask("resident"), ask("ours"), ask("ours"), ask("resident")]
    assert FakeChild.log == [
        *(starts("resident"), ask("resident")),  # which warms it up
        *(starts("ours"), ask("ours"), *pair, "ours ends"),
        *(starts("ours-host"), ask("ours-host"), *(turn.replace("ours", "ours-host") for turn in pair)),
        "ours-host ends",
        *(starts("ours"), ask("ours"), *pair, "ours ends"),
        "resident ends",
        *("accelerate starts", "accelerate 20+1", "accelerate 20+4", "accelerate ends"),
    ]
    assert [(row["side"], row["asked"]) for row in result["rows"][1:]] == [
        *(("ours", "25%"), ("accelerate", "25%"), ("ours", "50%"), ("ours-host", "50%"))
    ]
    assert result["resident_and_ours_took_turns"]


def test_figures_stand_beside_their_bounds(gpu):
    result = bench(gpu, ["resident", "ours", "ours-host", "accelerate"], 0.5)
    _, ours, host, _ = result["rows"]
    assert ours["decode_bound_s"] == pytest.approx(0.015)  # 15 MB over the link, and not the resident model's 10 ms
    assert ours["decode_over_roof"] == pytest.approx(20 / 15)
    assert ours["share_of_resident_speed"] == pytest.approx(0.5)
    assert ours["traffic_over_roof"] == pytest.approx(0.75)
    assert ours["prefill_bound_s"] == pytest.approx(0.2) and ours["prefill_over_roof"] == pytest.approx(2.0)
    assert ours["speedup_over_accelerate"] == pytest.approx(20) and ours["speedup_over_host"] == pytest.approx(2.5)
    assert "speedup_over_host" not in host and host["speedup_over_accelerate"] == pytest.approx(8)
    assert ours["decode_peak_bytes"] == ours["budget_bytes"] - 1 < ours["prefill_peak_bytes"]
    assert ours["hit_rate"] == 0.75


def test_beladys_bound_knows_what_the_prompt_has_brought(tmp_path):
    """Without it measured hits could exceed their bound."""
    answers = [{"used": [[[0, 1, 2, 3], [0, 1], [3], [0, 1]]], "left_out": left_out} for left_out in (0, 2)]
    plan = plan_slots(budget_for(0.25, SHAPES, COSTS), SHAPES, COSTS)
    rates = []
    for answer in answers:
        rates.append(_belady(Measured("ours", "25%", plan, [answer], loaded={"slots": [2]})))
    assert rates == [3 / 5, 1 / 2]  # 0 and 1 were there, 3 was not, and then one of 0 and 1 is gone


def test_the_bound_is_the_resident_model_where_little_is_missed(gpu, monkeypatch):
    monkeypatch.setitem(SPEEDS, "ours", (0.020, 0.4, 1e6, 0))
    ours = bench(gpu, ["resident", "ours"], 1.0)["rows"][1]
    assert ours["decode_bound_s"] == pytest.approx(0.010) and ours["prefill_bound_s"] == pytest.approx(0.1)


def test_a_resident_model_that_does_not_fit_beside_ours_goes_first(gpu, monkeypatch):
    monkeypatch.setattr(Cuda, "room_bytes", lambda self: run.KEPT_FREE_BYTES["cuda"] + 5001)
    result = bench(gpu, ["resident", "ours"], 0.5)
    assert FakeChild.log.index("resident ends") < FakeChild.log.index("ours starts")
    assert not result["resident_and_ours_took_turns"]
    assert result["rows"][1]["decode_bound_s"] == pytest.approx(0.015)


def test_a_side_that_fails_keeps_nobody_from_going_on(gpu, monkeypatch):
    monkeypatch.setattr(FakeChild, "fails", ("resident", "load"))
    kept = []
    result = bench(gpu, ["resident", "ours"], 0.5, 0.25, keep=kept.append)
    assert [len(one["rows"]) for one in kept] == [2, 3] and kept[-1] == result
    assert result["rows"][0]["failed"] and "decode_bound_s" not in result["rows"][1]
    assert "resident failed: resident: out of memory" in format_table(result)
    assert result["tokens_of"] == "ours"
    assert [(one["side"], one["asked"]) for one in result["tokens_agree"]] == [("ours", "50%")]


def test_where_no_side_can_be_loaded_the_table_says_why(gpu, monkeypatch):
    monkeypatch.setattr(FakeChild, "fails", ("ours", "load"))
    shown = format_table(bench(gpu, ["ours"], 0.5))
    assert "ours failed: ours: out of memory" in shown and "no two sides answered" in shown


def test_the_table_says_all_that_a_reader_needs(gpu, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shown = format_table(bench(gpu, ["resident", "ours", "accelerate"], 0.25, 0.5))
    assert "NVIDIA H100 80GB HBM3, 80.00 GB, Triton 3.6.0" in shown
    assert "link roof 1.00 GB/s (copy engine 1.00 GB/s, gather kernel 500.00 MB/s)" in shown
    assert "the first 8 decoded tokens of each left out" in shown and "all rows in pinned RAM" in shown
    assert "until they part: accelerate 25% 2 of 5, accelerate 50% 2 of 5" in shown
    assert "MoE-Infinity: not installed" in shown
    lines = shown.splitlines()
    (head,) = (line for line in lines if "bound ms" in line)
    (ours,) = (line for line in lines if line.startswith("ours 25%"))
    assert len(head) == len(ours)
    cells = ours.split()
    assert cells[2:8] == ["50.00", "20.00", "15.00", "75%", "50%", "75%"]
    (ratio,) = (line for line in lines if line.startswith("decode, times accelerate's cpu offload"))
    assert ratio.split()[-2:] == ["20.00", "20.00"]
