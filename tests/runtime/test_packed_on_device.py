"""Quantised experts where the device decides, on a CPU: plain transformers' logits, and a decode graph that reads
packed rows and asks the host nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_offload.apps.families.quantised.kinds import KINDS
from moe_offload.apps.families.session import run_session
from moe_offload.checkpoint.quantised.weights import MatrixWeight
from moe_offload.forward.graphs import compiling
from moe_offload.forward.graphs.products import packed_products
from moe_offload.runtime.kernels import KERNELS
from passes import ops
from tests.fakes.offloaded import SETTINGS
from tests.fakes.quantised_checkpoints import load, write

NO_CT = importlib.util.find_spec("compressed_tensors") is None
SESSION = {"batch": 1, "prompt": 17, "new_tokens": 6}
DEVICE = replace(SETTINGS, decide="device")
FAST = [("mxfp4", "grouped_mm"), ("fp8", "batched_mm")]


def marked(kind, implementation):
    needs = KINDS[kind].needs
    absent = bool(needs) and importlib.util.find_spec(needs) is None
    marks = [pytest.mark.skipif(absent, reason=f"needs {needs}")]
    return pytest.param(
        kind, implementation, marks=marks if (kind, implementation) in FAST else [*marks, pytest.mark.long]
    )


EACH = [marked(kind, implementation) for kind in KINDS for implementation in ("grouped_mm", "batched_mm")]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "implementation"), EACH)
def test_logits_are_plain_transformers(kind, implementation, tmp_path, monkeypatch):
    folder = write(kind, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).eval()
    want = run_session(plain, "lm", **SESSION)
    graphs = []
    monkeypatch.setattr(compiling, "run_graph", lambda gm, inputs: graphs.append(gm) or gm.forward)
    model = load(folder, 0.5, replace(DEVICE, experts_implementation=implementation), device_map="cpu")
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            assert torch.equal(ours, theirs)
        stats = handle.stats()
        assert stats.misses > 0 and stats.by_device == len(stats.layers) * (SESSION["new_tokens"] - 1)
    decode = [gm for gm in graphs if any(node.target in ops.PLACES for node in gm.graph.nodes)]
    assert decode
    for gm in decode:
        called = [node.target for node in gm.graph.nodes if node.op == "call_function"]
        reads = ops.packed_mm if implementation == "grouped_mm" else ops.unpack
        assert called.count(ops.place) == len(stats.layers) and called.count(reads) == 2 * len(stats.layers)
        assert ops.stream not in called and ops.fetch not in called
        assert not any(torch.Tag.cudagraph_unsafe in getattr(target, "tags", ()) for target in called)


def test_packed_rows_are_read_ahead(tmp_path):
    folder = write("fp8", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    want = run_session(plain, "lm", **SESSION)
    model = load(folder, 0.0, replace(DEVICE, lookahead=True, wave_rows=4), device_map="cpu")
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            assert torch.equal(ours, theirs)
        assert handle.stats().ahead > 0 and handle.stats().by_device > 0


def test_layers_on_disk_are_renamed_too_and_asked_of_the_host(tmp_path, monkeypatch):
    """Left to `waves`, one of them would take all layers back to the host in the middle of a step."""
    folder = write("fp8", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    want = run_session(plain, "lm", **SESSION)
    graphs = []
    monkeypatch.setattr(compiling, "run_graph", lambda gm, inputs: graphs.append(gm) or gm.forward)
    where = {"": "cpu", "model.layers.0.mlp.experts": "cpu", "model.layers.1.mlp.experts": "disk"}
    model = load(folder, 0.5, DEVICE, device_map=where)
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            assert torch.equal(ours, theirs)
        assert [layer.by_device > 0 for layer in handle.stats().layers] == [True, False]
    called = [{node.target for node in gm.graph.nodes if node.op == "call_function"} for gm in graphs]
    assert any({ops.place, ops.fetch, ops.packed_mm} <= targets for targets in called)


@pytest.fixture
def gpu_products():
    """The ops of packed weights as on a GPU, by kernels that are the reference here."""
    library = torch.library.Library("moe_offload", "IMPL")
    used = []
    for name, product in packed_products(KERNELS["cpu"]()).items():

        def counted(*args, name=name, product=product):
            used.append(name)
            return product(*args)

        library.impl(name, torch._disable_dynamo(counted), "CPU")
    yield used
    library._destroy()


@pytest.mark.parametrize(
    ("kind", "product"),
    [
        ("fp8", "packed_gated_mm"),
        pytest.param("mxfp4", "packed_mm", marks=pytest.mark.long),
        pytest.param(
            "ct-int4", "packed_gated_mm", marks=[pytest.mark.long, pytest.mark.skipif(NO_CT, reason="needs a package")]
        ),
    ],
)
def test_the_graph_of_a_gpu_says_the_same(kind, product, gpu_products, tmp_path, monkeypatch):
    """Its pairs unsorted, gate and up in one product, topk with the decision; and prompts by the grouped product. Sums
    are in another order: the logits are near, and the tokens the same."""
    folder = write(kind, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    want = run_session(plain, "lm", **SESSION)
    monkeypatch.setattr(compiling, "is_on_gpu", lambda bank_SN: True)
    monkeypatch.setattr(compiling, "joins_gates", lambda inner: True)
    model = load(folder, 0.5, DEVICE, device_map="cpu")
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())
        assert handle.stats().by_device > 0
    assert {"packed_mm", product} <= set(gpu_products)


def test_a_weight_that_kernels_cannot_read_is_left_to_the_host(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(MatrixWeight, "row_codes", lambda self, transposed: None)
    folder = write("mxfp4", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    want = run_session(plain, "lm", **SESSION)
    with caplog.at_level("WARNING"):
        model = load(folder, 0.5, DEVICE, device_map="cpu")
    said = [record.message for record in caplog.records]
    assert sum("do not lie in their rows as the kernels of a device read" in message for message in said) == 1
    with model.moe_offload as handle:
        for ours, theirs in zip(run_session(model, "lm", **SESSION), want, strict=True):
            assert torch.equal(ours, theirs)
        assert handle.stats().by_device == 0
