"""The bench on a GPU, as far as it goes without one: what each side is told, what is said where there is none."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moe_offload.api
from moe_offload.bench import contenders, contenders_cuda, link
from moe_offload.bench.limit import METERS
from moe_offload.bench.link import fastest, link_rates
from moe_offload.bench.request import EDGES, ask
from moe_offload.bench.result import RATIOS, _belady, result_of
from moe_offload.bench.synthetic import synthetic
from moe_offload.bench.table import table
from moe_offload.bench.workload import Measured, Workload
from moe_offload.cli import app
from moe_offload.config import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return synthetic("tiny", cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path):
    done = CliRunner().invoke(app, ["bench", "synthetic:tiny", "--residency", "50%", "--device", "cuda"])
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert "finds no CUDA device" in " ".join(done.output.split())


@pytest.mark.parametrize(("side", "decide"), [("ours", "device"), ("ours-host", "host")])
def test_what_ours_is_told(folder, tmp_path, monkeypatch, side, decide):
    told = {}
    monkeypatch.setattr(moe_offload.api, "from_pretrained", lambda *a, **k: told.update(k, given=a))
    contenders_cuda.SIDES_ON["cuda"][side](folder, 123, tmp_path)
    assert told["given"] == (folder, 123)
    assert told["device_map"] == {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(3)}}
    config = resolve(told["config"])
    found = config.untested, config.compile, config.policy, config.decide
    assert found == (True, "inductor", "decayed_lfu", decide)


def test_what_the_others_are_told(folder, tmp_path, monkeypatch):
    import transformers

    told = {}
    model = types.SimpleNamespace(eval=lambda: model, to=lambda device: told.update(to=device))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, **k: told.update(k) or model
    )
    contenders_cuda.SIDES_ON["cuda"]["resident"](folder, 5, tmp_path)
    assert told == {"dtype": "auto", "to": "cuda"}
    contenders_cuda.SIDES_ON["cuda"]["accelerate"](folder, 5, tmp_path)
    assert told["device_map"] == "auto" and told["max_memory"][0] == 5 and told["max_memory"]["cpu"] > 10**8
    assert "mmap" not in contenders_cuda.SIDES_ON["cuda"] and contenders_cuda.SIDES_ON["cpu"] is contenders.SIDES


def test_a_plan_for_rows_in_ram(folder):
    plan = moe_offload.make_plan(folder, "1GB", device_map=contenders_cuda.rows_in_ram(folder))
    assert plan.residency == 1.0


@pytest.mark.parametrize(("left_out", "waits"), [(0, [0, 1]), (2, [0, 1, 3])])
def test_a_gpu_is_waited_for_at_the_edges_alone(monkeypatch, left_out, waits):
    waited = []
    monkeypatch.setitem(EDGES, "cpu", lambda: waited.append(len(made)))
    made = []

    class Model:
        def generate(self, input_ids, streamer, max_new_tokens, **options):
            assert options["cache_implementation"] == "static"
            streamer.put(input_ids)
            for token in range(max_new_tokens):
                made.append(token)
                streamer.put(torch.tensor([token]))

    count = lambda: {"made": len(made)}  # noqa: E731
    answer = ask(Model(), [1, 2], 4, count, left_out=left_out, **contenders_cuda.STATIC)
    assert answer.tokens == [0, 1, 2, 3, 4]
    assert waited == waits  # before the request, with its first token, and with the last that does not count
    assert answer.prefill == {"made": 1} and answer.decode == {"made": 4 - left_out}


def test_the_link_is_measured_by_row(monkeypatch):
    rates = link_rates(4096, "cpu", host_bytes=1 << 17)
    assert set(rates) == {"copy_engine", "kernel"} and min(rates.values()) > 0
    assert fastest({"copy_engine": 2.0, "kernel": 3.0, "free_bytes": 9.0}) == 3.0


def test_pinned_memory_is_used_and_a_refusal_says_why(monkeypatch):
    """`pinned.pin` answers with what went wrong: nothing is good news."""
    undone = []
    monkeypatch.setattr(link.pinned, "unpin", undone.append)
    monkeypatch.setattr(link.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(link.torch, "device", lambda device: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(link.pinned, "pin", lambda rows: "the memlock limit")
    with pytest.raises(RuntimeError, match="cannot be pinned: the memlock limit"):
        link_rates(4096, "cpu", host_bytes=1 << 17)
    monkeypatch.setattr(link.pinned, "pin", lambda rows: "")

    class Reached(Exception):
        pass

    def view(rows, device):
        raise Reached

    monkeypatch.setattr(link.pinned, "device_view", view)
    with pytest.raises(Reached):
        link_rates(4096, "cpu", host_bytes=1 << 17)
    assert len(undone) == 2


def test_counters_of_memory_are_there_before_they_are_reset(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    METERS["cuda"].reset()
    assert called == ["init", "reset"]


def test_beladys_bound_knows_what_the_prompt_has_brought():
    """Without it measured hits could exceed their bound."""
    rates = []
    for left_out in (0, 2):
        answer = {"used": [[[0, 1, 2, 3], [0, 1], [3], [0, 1]]], "left_out": left_out}
        rates.append(_belady(Measured("ours", [answer], loaded={"slots": [2]})))
    assert rates == [3 / 5, 1 / 2]  # 0 and 1 were there, 3 was not, and then one of 0 and 1 is gone


def answered(side: str, token_s: float, **decode: float) -> Measured:
    counters = {"hits": 3, "misses": 1, "bytes_read": 0, "stall_s": 0.0, **decode}
    answer = {"ttft_s": 2.0, "decode_s": 4 * token_s, "tokens": [1] * 5, "left_out": 0, "decode": counters}
    answer["prefill"] = {**counters, "bytes_read": 0}
    slots = [8] if side.startswith("ours") else None
    answer["used"] = [[[0, 1, 2, 3], *[[0, 1, 2, 3]] * 4]] if slots else None
    return Measured(side, [answer], roofs=[100.0], loaded={"load_s": 1.0, "slots": slots, "routing": None})


def test_ratios_are_of_the_link(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    plan = moe_offload.make_plan(folder, "1GB", device_map=contenders_cuda.rows_in_ram(folder))
    work = Workload(folder, plan, 1024, prompt_tokens=4, new_tokens=4, requests=1, device="cuda")
    sides = [
        answered("resident", 0.5),
        answered("ours", 1.0, bytes_read=320),  # 80 a token over 100 bytes/s: 0.8 s is the roof, not the 0.5
        answered("ours-host", 3.0, bytes_read=320),
        answered("accelerate", 20.0),
    ]
    link = {"copy_engine": 100.0, "kernel": 90.0, "free_bytes": 10.0}
    result = result_of(work, {one.side: one for one in sides}, True, link)
    assert result["roofs"]["link_bytes_per_s"] == 100.0 and result["device"] == "cuda"
    assert result["ratios"] == pytest.approx(
        {
            "decode_over_roof": 1.25,
            "prefill_over_roof": 1.0,
            "share_of_resident_speed": 0.5,
            "miss_traffic_over_link": 0.8,
            "speedup_over_accelerate_cpu": 20.0,
            "speedup_over_ours_host": 3.0,
        }
    )
    assert list(result["ratios"]) == list(RATIOS["cuda"])
    shown = table(result)
    assert "a GPU" in shown and "link by copy engine 100 B/s" in shown and "ours-host" in shown
