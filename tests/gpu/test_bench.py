"""The bench on a GPU: recorded ids inside a CUDA graph, the link, and every side of a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from moe_offload.bench.link import link_rates
from moe_offload.bench.routing import Recorded, Routing
from moe_offload.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_each_replay_of_a_graph_takes_the_next_row():
    recorded = Recorded(torch.arange(6 * 2).view(6, 1, 2), "")
    routing = Routing(recorded, [2], tokens=6, device="cuda")
    ids = torch.zeros((1, 2), dtype=torch.int64, device="cuda")
    routing.seek(0, 6)
    routing(ids, 0)  # what is loaded lazily must not be loaded in the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routing(ids, 0)
    for begin in (0, 2):
        routing.seek(begin, 4)
        for row in range(begin, begin + 4):
            graph.replay()
            assert torch.equal(out[0].cpu(), recorded.ids_TLK[row, 0])


def test_both_ways_over_the_link():
    rates = link_rates(1 << 20, "cuda", host_bytes=1 << 26)
    assert all(1e9 < rate < 1e12 for rate in rates.values())


@pytest.mark.timeout(600)
def test_every_side_in_one_run(tmp_path):
    file = tmp_path / "result.json"
    amounts = ["--prompt-tokens", "24", "--new-tokens", "6", "--requests", "1"]
    asked = ["synthetic:tiny", "--residency", "50%", "--device", "cuda", "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["bench", *asked, *amounts, "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = {row["side"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["resident", "ours", "ours-host", "accelerate"]
    # The budget of a tiny model may be too small for accelerate to place anything: that is its answer.
    assert not any(rows[side]["failed"] for side in ("resident", "ours", "ours-host")), done.output
    assert rows["ours"]["hit_rate"] > 0 and rows["ours"]["peak_bytes"] > 0
