"""Decode steps as on a GPU, on a CPU that stands in for one: what is recorded, for which threads, in which memory."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._inductor import cudagraph_trees

from moe_offload.forward.graphs import compiling, small_kernels
from moe_offload.forward.graphs.kv_pool import KVPool
from moe_offload.forward.out_of_memory.retry import Retry
from moe_offload.patch.generation.static_cache import keep_static_caches
from tests.fakes.offloaded import SETTINGS, offload, resident

DEVICE = replace(SETTINGS, decide="device", compile="inductor", poison=False, dynamic=None)


class Recordings:
    """In Inductor's place. Each launch of a step is noted: (thread, where Inductor would look for recordings, where
    everything lies that a step writes to)."""

    def __init__(self):
        self.launches, self.sorts = [], 0

    def compile(self, gm, inputs, **options):
        if not options:  # a prompt
            return gm.forward
        assert options == {**compiling.CUDA_GRAPH, **small_kernels.options()}
        self.sorts += sum(getattr(node.target, "__name__", "") == "sort" for node in gm.graph.nodes)
        written = [
            i
            for i, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder")
            if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") == "unguarded"
        ]

        def run(*args):
            kept = id(cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers"))
            self.launches.append((threading.get_ident(), kept, tuple(args[i].data_ptr() for i in written)))
            return gm.forward(*args)

        return run

    @property
    def threads(self):
        return {thread for thread, _, _ in self.launches}

    @property
    def kept(self):
        return {kept for _, kept, _ in self.launches}

    @property
    def memories(self):
        return {places for _, _, places in self.launches}


@pytest.fixture
def recordings(monkeypatch):
    torch._dynamo.reset()
    found = Recordings()
    monkeypatch.setattr(compiling, "run_inductor", found.compile)
    monkeypatch.setattr(compiling, "core_inductor", compiling.core_as_is)
    monkeypatch.setattr(compiling, "is_on_gpu", lambda bank_SN: True)
    monkeypatch.setattr(Retry, "_runs_out", lambda self: True)
    return found


def generate(model, length):
    ids = (torch.arange(length) * 7 % 90 + 3).view(1, -1)
    return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)


def test_requests_of_any_thread_replay_the_same_recordings(recordings):
    """A streamer's thread, one for each request: Inductor keeps recordings by thread, and each would record anew."""
    plain, model = resident(layers=2), offload(resident(layers=2), 0.5, config=DEVICE, device_map="cpu")
    keep_static_caches(model, KVPool(2 * 48), 48)
    for length in (3, 9, 5):
        assert torch.equal(generate(model, length), generate(plain, length))
    gc.collect()  # what is compiled holds the caches that it was traced with, for a while
    recordings.launches.clear()
    generate(model, 7)
    memories = recordings.memories
    for length in (4, 8, 12, 6):
        gc.collect()  # a cache that is in a cycle is given back when that is found
        with ThreadPoolExecutor(1) as one:
            assert torch.equal(one.submit(generate, model, length).result(), generate(plain, length))
    assert len(recordings.launches) == 5 * 3 and len(recordings.kept) == 1
    assert len(recordings.threads) > 1 and recordings.memories == memories
    assert len(memories) == 1 and recordings.sorts == 0
    assert model.moe_offload.stats().by_device == 2 * 3 * 8
    model.moe_offload.close()


def test_a_step_whose_bank_may_move_is_not_recorded(recordings, monkeypatch):
    """What is not static is copied at each launch: a copy of a bank takes as long as all slots of a layer."""
    plain, model = resident(), offload(resident(), 0.5, config=DEVICE, device_map="cpu")
    keep_static_caches(model, KVPool(2 * 48), 48)
    monkeypatch.setattr(compiling, "is_static", lambda node: False)
    assert torch.equal(generate(model, 5), generate(plain, 5)) and not recordings.launches
    model.moe_offload.close()


def test_guesses_are_part_of_what_is_recorded(recordings):
    """No op of theirs needs the host, which would keep the whole step from being recorded."""
    device = replace(DEVICE, lookahead=True, wave_rows=4)
    plain, model = resident(layers=2), offload(resident(layers=2), 0.75, config=device, device_map="cpu")
    keep_static_caches(model, KVPool(2 * 48), 48)
    for length in (3, 4):
        assert torch.equal(generate(model, length), generate(plain, length))
    assert len(recordings.launches) == 2 * 3
    assert int(model.moe_offload._runtime.device_caches._block.guesses_L4[1, 0]) > 0
    model.moe_offload.close()


@pytest.mark.long
def test_a_step_that_runs_out_of_memory_is_recorded_anew_with_fewer_slots(recordings, monkeypatch):
    plain, model = resident(layers=2), offload(resident(layers=2), 0.9, config=DEVICE, device_map="cpu")
    keep_static_caches(model, KVPool(2 * 48), 48)
    want, slots = generate(plain, 5), model.moe_offload._runtime.slots
    assert torch.equal(generate(model, 5), want)
    failed = []
    place_top = type(model.moe_offload._runtime.layers[0]).place_top

    def fail(self, scores_TE, k):
        if self.moe.index == 1 and len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return place_top(self, scores_TE, k)

    monkeypatch.setattr(type(model.moe_offload._runtime.layers[0]), "place_top", fail)
    assert torch.equal(generate(model, 5), want) and failed
    assert all(now < then for now, then in zip(model.moe_offload._runtime.slots, slots, strict=True))
    model.moe_offload.close()
