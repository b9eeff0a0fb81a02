"""The bench on a GPU: every side of it on a tiny model, and routing that a CUDA graph replays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moe_offload.apps.bench.roofs.link import link_roof
from moe_offload.apps.bench.routing import Routing, load_recorded
from moe_offload.apps.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def trace(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "recorded.npz"
    np.savez(file, experts=np.stack([[rng.permutation(32)[:4] for _ in range(3)] for _ in range(40)]))
    return file


def test_a_graph_replays_other_ids_each_time(trace):
    recorded = load_recorded(trace, 3, 32, 4)
    routing = Routing(recorded, [4] * 3, tokens=20, device="cuda:0")
    given_TK = torch.zeros((1, 4), dtype=torch.int64, device="cuda")
    for layer in range(3):
        routing(given_TK, layer)  # what is loaded lazily must not be loaded in the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids_TK = [routing(given_TK, layer) for layer in range(3)]
    routing.seek(35, 20)
    for row in (35, 36, 37, 38, 39, 0, 1):
        graph.replay()
        assert all(torch.equal(ids.cpu()[0], recorded.ids_TLK[row, layer]) for layer, ids in enumerate(ids_TK))


def test_both_ways_over_the_link():
    with link_roof(4 << 20, "cuda:0") as roof:
        roof.rows_EN.fill_(7)
        roof.measure(0)
        assert (roof.bank_SN == 7).all()
        assert all(1e9 < rate < 1e12 for rate in roof.details().values())


@pytest.mark.timeout(900)
def test_every_side_in_one_run(trace, tmp_path):
    file = tmp_path / "result.json"
    amounts = ["--prompt-tokens", "40", "--new-tokens", "24", "--requests", "2", "--cache", str(tmp_path / "cache")]
    asked = ["synthetic:tiny", "--device", "cuda", "--residency", "50%,100%", "--routing", str(trace)]
    done = CliRunner().invoke(app, ["bench", *asked, *amounts, "--out", str(file)])
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 7
    # The budget of a tiny model may be too small for accelerate to place anything: that is its answer.
    assert not any(row["failed"] for row in result["rows"] if row["side"] != "accelerate"), done.output
    ours = {(row["side"], row["asked"]): row for row in result["rows"] if row["side"].startswith("ours")}
    for asked in ("50%", "100%"):  # the same decisions, whoever makes them
        device, host = ours["ours", asked], ours["ours-host", asked]
        assert (device["hit_rate"], device["bytes_per_token"]) == (host["hit_rate"], host["bytes_per_token"])
        assert device["hit_rate"] <= device["belady_hit_rate"]
