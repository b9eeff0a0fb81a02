"""A whole model on a GPU: the resident model's tokens, no wait for the host while decoding, memory inside the budget.

python -m pytest -m gpu            everything that needs a GPU; benchmarks/gpu.py runs it with the measurements
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

import moe_offload
from moe_offload import OffloadConfig, OffloadError
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.forward.graphs.recordings import forget_recordings, launch
from moe_offload.memory.buffers import page_aligned
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from moe_offload.runtime.kernels import Loads
from tests.fakes.offloaded import IDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
SETTINGS = OffloadConfig(experts_implementation="grouped_mm", compile="graph", kv_tokens=64, wave_rows=2, untested=True)
DEVICE, HOST = replace(SETTINGS, decide="device"), replace(SETTINGS, decide="host", policy="decayed_lfu")
STATIC = {"cache_implementation": "static", "disable_compile": True}  # generate compiles the resident model itself


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def on_gpu(family, dtype=torch.float32, **sizes):
    layers = 3 if family == "deepseek_v3" else 2  # its first one has no experts
    return build(family, num_hidden_layers=layers, **sizes).to("cuda", dtype).eval()


def offloaded(family, settings, residency=0.5, dtype=torch.float32, where="cpu", **sizes):
    model = on_gpu(family, dtype, **sizes)
    moe_layers = find_experts(model)
    budget = budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings, "cuda:0"))
    rows = {"": 0, "model.layers.*.mlp.experts": where}
    if where == "mixed":
        rows = {"": 0, moe_layers[0].name: "cpu", moe_layers[1].name: "disk"}
    return moe_offload.optimize(model, budget, device_map=rows, config=settings)


def say(model, n=24, **options):
    return model.generate(IDS.cuda(), max_new_tokens=n, do_sample=False, pad_token_id=0, **options).cpu()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids.cuda()).logits.float().cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
@pytest.mark.parametrize("where", ["cpu", "disk", "mixed"])
def test_tokens_are_those_of_the_resident_model(family, settings, where):
    plain = on_gpu(family)
    want = say(plain)
    model = offloaded(family, settings, where=where)
    got = say(model)
    assert torch.equal(got, want)
    # The kernels are not those of the resident model: sums in another order.
    torch.testing.assert_close(logits_of(model, want), logits_of(plain, want), rtol=1e-4, atol=1e-4)
    stats = model.moe_offload.stats()
    assert stats.misses > 0
    by_device = settings.decide == "device"
    assert [layer.decides == "device" for layer in stats.layers] == [
        by_device and where != "disk",
        by_device and where == "cpu",
    ]
    assert (stats.by_device > 0) == (by_device and where != "disk")
    model.moe_offload.close()


@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
def test_bfloat16_differs_by_rounding_alone(settings):
    """Only there is transformers' own grouped product traced on a GPU: in float32 it takes another way."""
    plain = on_gpu("qwen3_moe", torch.bfloat16)
    model = offloaded("qwen3_moe", settings, dtype=torch.bfloat16)
    ids = say(plain)
    torch.testing.assert_close(logits_of(model, ids), logits_of(plain, ids), rtol=0.05, atol=0.05)
    with torch.no_grad():
        caches = [StaticCache(config=plain.config, max_cache_len=64) for _ in range(2)]
        for part in (ids[:, :12], *ids[:, 12:].split(1, dim=1)):
            want, got = (
                one(part.cuda(), past_key_values=cache).logits
                for one, cache in zip((plain, model), caches, strict=True)
            )
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    model.moe_offload.close()


@pytest.mark.parametrize("compile", ["graph", "inductor"])
def test_batches_are_decided_by_the_device(compile):
    plain = on_gpu("qwen3_moe")
    model = offloaded("qwen3_moe", replace(DEVICE, compile=compile), residency=0.75)
    for sequences in (2, 3, 2):
        ids = torch.cat([IDS + i for i in range(sequences)]).cuda()
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        before = model.moe_offload.stats()
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options)), sequences
        assert (model.moe_offload.stats() - before).by_device == 2 * 23
    model.moe_offload.close()


def test_where_every_expert_has_a_slot_the_device_decides():
    model = offloaded("qwen3_moe", DEVICE, residency=1.0, where="disk")
    assert torch.equal(say(model), say(on_gpu("qwen3_moe")))
    assert model.moe_offload.stats().by_device == 2 * 23
    model.moe_offload.close()


@pytest.mark.parametrize("where", ["cpu", "mixed"])
@pytest.mark.parametrize("run_before", [False, True])
def test_a_capture_that_needs_the_host_is_refused_and_leaves_nothing_behind(where, run_before):
    model = offloaded("qwen3_moe", DEVICE, where=where)
    if run_before:
        say(model)
    ids = IDS.cuda()
    side = torch.cuda.Stream()
    with pytest.raises(OffloadError, match="captured"), torch.no_grad(), torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            model(ids)
    torch.cuda.synchronize()
    assert torch.equal(say(model), say(on_gpu("qwen3_moe")))
    model.moe_offload.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_launches_there():
    model = build("qwen3_moe", num_hidden_layers=2).to("cuda:1").eval()
    want = model.generate(IDS.to("cuda:1"), max_new_tokens=24, do_sample=False, pad_token_id=0).cpu()
    moe_layers = find_experts(model)
    budget = budget_for(0.5, layer_shapes(moe_layers), sum_costs(model, moe_layers, DEVICE, "cuda:1"))
    model = moe_offload.optimize(model, budget, device_map={"": 1, "model.layers.*.mlp.experts": "cpu"}, config=DEVICE)
    assert torch.cuda.current_device() == 0
    got = model.generate(IDS.to("cuda:1"), max_new_tokens=24, do_sample=False, pad_token_id=0).cpu()
    assert torch.equal(got, want) and model.moe_offload.stats().by_device == 2 * 23
    model.moe_offload.close()


@pytest.mark.parametrize("replayed", [False, True])
def test_the_device_decides_as_the_host_does(replayed):
    """Warmed up, recorded and replayed, each step is counted once."""
    seen = []
    for settings in (replace(DEVICE, compile="inductor") if replayed else DEVICE, HOST):
        torch._dynamo.reset()
        model = offloaded("qwen3_moe", settings)
        say(model, n=200, **(STATIC if replayed else {}))
        stats = model.moe_offload.stats()
        seen.append((stats.hits, stats.misses, stats.tokens, model.moe_offload.profile().counts))
        model.moe_offload.close()
    assert seen[0] == seen[1]


def test_decoding_waits_for_nothing():
    """Any synchronising call in a decode step is an error here."""
    model = offloaded("qwen3_moe", DEVICE)
    step = torch.tensor([[5]], device="cuda")
    with torch.no_grad():
        past = model(IDS.cuda(), use_cache=True).past_key_values
        for _ in range(3):
            model(step, past_key_values=past, use_cache=True)  # traced, and the kernels compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                model(step, past_key_values=past, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    model.moe_offload.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_replayed_as_a_graph_says_the_same_over_200_steps(family):
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    want = say(on_gpu(family), n=200, **STATIC)
    model = offloaded(family, replace(DEVICE, compile="inductor"))
    counters.clear()
    assert torch.equal(say(model, n=200, cache_implementation="static"), want)
    assert not counters["inductor"]["cudagraph_skips"]
    recorded = launch(lambda: list(get_manager(0, create_if_none_exists=False).get_roots()), torch.device("cuda:0"))
    assert 1 <= len(recorded) <= 4, "none, or one for nearly every step"
    # Ids, positions, masks, which are small. Banks and KV caches must not be among what each replay copies.
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] <= 6 * len(recorded)
    model.moe_offload.close()


def test_requests_of_any_length_and_thread_replay_a_few_recordings():
    """By default: nobody asks for a static cache. Two hundred requests, and the last ones from other threads."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    plain, model = on_gpu("qwen3_moe"), offloaded("qwen3_moe", replace(DEVICE, compile="inductor"))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def ask(i):
        ids = (torch.arange(2 + i * 7 % 40) % 90 + 3).view(1, -1).cuda()
        return model.generate(ids, **options).cpu(), plain.generate(ids, **options).cpu()

    def roots():
        return launch(
            lambda: len(list(get_manager(0, create_if_none_exists=False).get_roots())), torch.device("cuda:0")
        )

    for i in range(10):
        assert torch.equal(*ask(i))
    counters.clear()
    warm, reserved = roots(), torch.cuda.memory_reserved()
    for i in range(190):
        assert torch.equal(*ask(i))
    with ThreadPoolExecutor(1) as other:
        assert all(torch.equal(*both) for both in other.map(ask, range(4)))
    assert roots() == warm <= 4 and not counters["inductor"]["cudagraph_skips"]
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)
    forget_recordings()  # as after Ctrl-C, or when the device runs out of memory
    assert torch.equal(*ask(0)) and torch.equal(*ask(0)) and 1 <= roots() <= warm
    model.moe_offload.close()


@pytest.mark.parametrize("compile", ["graph", "inductor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_ahead_changes_no_token_and_no_decision(family, compile):
    """On a second stream, and in a recorded step in the same graph, for 200 steps."""
    from torch._dynamo.utils import counters

    settings = replace(DEVICE, compile=compile, wave_rows=8)
    found = []
    for one in (settings, replace(settings, lookahead=True)):
        torch._dynamo.reset()
        model = offloaded(family, one)
        counters.clear()
        said = say(model, n=200, **({"cache_implementation": "static"} if compile == "inductor" else {}))
        assert not counters["inductor"]["cudagraph_skips"]
        stats = model.moe_offload.stats()
        found.append((said, stats.hits, stats.misses, model.moe_offload.profile().counts))
        rows, used, late, _ = model.moe_offload._runtime.device_caches._block.guesses_L4.sum(0).tolist()
        assert (rows >= used >= late > -1) and (used > 0) == one.lookahead
        model.moe_offload.close()
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_a_copy_beside_ends_when_it_is_told_to():
    """Half a gigabyte would take milliseconds; and what has been copied by then is whole."""
    from moe_offload.memory.transfer.fork import CudaFork
    from moe_offload.runtime.kernels.staging import STAGERS, Staging
    from moe_offload.runtime.kernels.state_block import StateBlock

    rows_EN = torch.arange(16 << 22, dtype=torch.int64).view(16, -1).pin_memory()
    scratch_GN, bank_SN = (torch.zeros(16, 1 << 22, dtype=torch.int64, device="cuda") for _ in range(2))
    stagers, fork, staging = STAGERS["cuda"](), CudaFork(torch.device("cuda:0")), Staging.empty(16, "cuda")
    state, loads = StateBlock([(16, 16)], "cuda").states[0], Loads.empty(16, "cuda")
    for turn in range(3):
        ids_P = torch.arange(16, device="cuda").roll(turn)
        bank_SN.zero_()
        stagers.choose(ids_P, ids_P, state, staging)
        with fork.begin():
            stagers.stage(rows_EN, scratch_GN, staging)
        torch.cuda._sleep(2_000_000)  # a millisecond or so
        staging.stop_1.fill_(1)
        assert fork.join()
        reached = int(staging.reached_R.sum())
        loads.expert_P.copy_(ids_P)
        loads.slot_P.copy_(ids_P)
        loads.count_1.fill_(16)
        stagers.gather_staged(rows_EN, scratch_GN, bank_SN, loads, state, staging)
        assert torch.equal(bank_SN.cpu(), rows_EN)
        assert turn == 0 or 0 < reached < 16 * (1 << 11), "stopped on the way (the first time the kernel is compiled)"


def test_logits_that_are_kept_are_not_written_over():
    model, plain = offloaded("qwen3_moe", replace(DEVICE, compile="inductor")), on_gpu("qwen3_moe")
    kept = []
    for each in (model, plain):
        cache = StaticCache(config=plain.config, max_cache_len=32)
        with torch.no_grad():
            each(IDS.cuda(), past_key_values=cache)
            steps = [each(torch.tensor([[i]], device="cuda"), past_key_values=cache).logits for i in range(3, 11)]
        kept.append(torch.cat(steps))
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)
    model.moe_offload.close()


def test_memory_stays_inside_the_budget():
    # Large enough for rows to outweigh what cuBLAS takes for itself, for which the reserve has room.
    settings = replace(DEVICE, reserve="64MB")
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 64}
    model = offloaded("qwen3_moe", settings, residency=0.25, dtype=torch.bfloat16, **sizes)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    say(model, n=200)
    assert torch.cuda.max_memory_allocated() <= model.moe_offload.plan.budget_bytes
    model.moe_offload.close()


def test_two_models_on_one_gpu():
    one, other = offloaded("qwen3_moe", DEVICE), offloaded("gpt_oss", DEVICE)
    want = say(on_gpu("qwen3_moe")), say(on_gpu("gpt_oss"))
    for _ in range(2):
        assert torch.equal(say(one), want[0]) and torch.equal(say(other), want[1])
    one.moe_offload.close()
    other.moe_offload.close()


def test_what_was_pinned_is_given_back():
    from moe_offload.memory.transfer import pinned

    for _ in range(3):
        model = offloaded("qwen3_moe", DEVICE)
        rows = model.moe_offload._runtime.layers[0].store.rows_EN(0)
        assert rows.is_pinned() and pinned.device_address(rows.data_ptr()) == rows.data_ptr()
        model.moe_offload.close()
        assert pinned.device_address(rows.data_ptr()) is None
    fresh = page_aligned(2 * 4096).view(2, -1).zero_()
    assert pinned.pin_rows(fresh) == "" and torch.equal(pinned.device_view(fresh, "cuda:0").cpu(), fresh)
    pinned.unpin_rows(fresh)


def test_rows_of_a_group_are_copied_by_one_call():
    """Or one by one where the driver is older; and what the runtime refuses is named, and does not come up again."""
    from moe_offload.memory.transfer.batch import find_batch_copy
    from moe_offload.memory.transfer.streams import CudaStreams

    streams, batch = CudaStreams(torch.device("cuda:0")), find_batch_copy()
    rows = torch.arange(16 << 16, dtype=torch.int64).view(16, -1).pin_memory()
    for order in (range(16), (3, 9, 0)):
        bank = torch.zeros_like(rows, device="cuda")
        streams.order(streams.copy_all([bank[i] for i in order], [rows[15 - i] for i in order], streams.mark()))
        assert all(torch.equal(bank[i].cpu(), rows[15 - i]) for i in order)
        assert int(bank.count_nonzero()) == sum(int(rows[15 - i].count_nonzero()) for i in order)
    assert (batch is None) == (tuple(map(int, torch.version.cuda.split("."))) < (12, 8))
    if streams._batch is not None:
        with pytest.raises(OffloadError, match="cudaErrorInvalidValue"):
            streams._batch.copy([(0, 0, 64)], streams.stream.cuda_stream)
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]


def test_an_error_of_pinning_does_not_come_up_again():
    from moe_offload.memory.transfer import pinned

    rows = page_aligned(2 * 4096).view(2, -1)
    assert pinned._register(rows) == "" and pinned._register(rows) != ""
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]
    pinned.unpin_rows(rows)
    pinned.unpin_rows(rows)  # not pinned any more: an error, likewise
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("settings", [DEVICE, HOST], ids=["device", "host"])
def test_a_device_that_runs_out_in_a_forward(settings, caplog):
    """All that torch may hold is what it holds once the slots are there, and a little: no prompt fits beside them."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 64}
    ids = (torch.arange(512) % 97 + 3).view(1, -1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model = build("qwen3_moe", **sizes).to("cuda").eval()
    want = model.generate(ids.cuda(), **options).cpu()
    moe_layers = find_experts(model)
    budget = budget_for(0.9, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))
    rows = {"": 0, "model.layers.*.mlp.experts": "cpu"}
    model = moe_offload.optimize(model, budget, device_map=rows, config=settings)
    before = model.moe_offload.plan.slots
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limit = torch.cuda.memory_reserved() + (8 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert torch.equal(model.generate(ids.cuda(), **options).cpu(), want)
        assert torch.cuda.max_memory_reserved() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "ran out of memory" in caplog.text
    assert all(now < then for now, then in zip(model.moe_offload.plan.slots, before, strict=True))
    assert torch.cuda.max_memory_allocated() <= model.moe_offload.plan.budget_bytes
    assert torch.equal(model.generate(ids.cuda(), **options).cpu(), want)
    model.moe_offload.close()
