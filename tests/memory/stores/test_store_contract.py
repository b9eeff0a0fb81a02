"""What every store promises, checked on every entry of STORES (and on a spill file, which is a disk store too)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload.errors import ClosedError
from moe_offload.experts import MoELayer, find_experts
from moe_offload.memory.stores import STORES, DiskStore, HostStore, Store
from moe_offload.memory.stores.host import pack_rows
from moe_offload.memory.stores.spill import spill_layers
from tests.fakes.tiny_checkpoints import assert_holds, assert_row, build, index_of, new_row, save, view


def disk(model: Any, folder: Path) -> DiskStore:
    moe_layers, index = index_of(model, save(model, folder, "20KB"))
    return DiskStore([moe.layout for moe in moe_layers], index)


def host(model: Any, folder: Path) -> HostStore:
    return HostStore([pack_rows(moe) for moe in find_experts(model)])


def spilled(model: Any, folder: Path) -> DiskStore:
    return spill_layers(find_experts(model), find_experts(model), folder)


MAKERS: dict[str, Callable[[Any, Path], Store]] = {"disk": disk, "host": host}
EVERY = {**MAKERS, "spill": spilled}

Made = tuple[Store, list[MoELayer]]


@pytest.fixture(params=["per_expert", "stacked"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param, dtype=torch.bfloat16)


@pytest.fixture(params=EVERY)
def made(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> Made:
    return EVERY[request.param](model, tmp_path), find_experts(model)


def test_every_store_is_under_this_contract() -> None:
    assert set(MAKERS) == set(STORES)


def test_every_row_is_the_expert_s(made: Made) -> None:
    store, moe_layers = made
    assert_holds(store, moe_layers)
    store.close()


@pytest.mark.parametrize(("layer", "expert"), [(0, 4), (0, -1), (2, 0), (-1, 0), (10**9, 0)])
def test_layer_and_expert_must_be_in_range(made: Made, layer: int, expert: int) -> None:
    store, moe_layers = made
    row = new_row(moe_layers[0])
    with pytest.raises(IndexError, match=f"layer {layer}, expert {expert}"):
        store.read(layer, expert, view(row))
    assert bool((row == 0xAB).all())


def test_row_must_be_writable_bytes_of_exactly_the_row_s_size(made: Made) -> None:
    store, moe_layers = made
    row = view(new_row(moe_layers[0]))
    for wrong in (row[:-1], row[:0], row.toreadonly(), row.cast("i"), row[::2]):
        with pytest.raises(ValueError, match="layer 0: a row is"):
            store.read(0, 0, wrong)


def test_many_threads_read_the_right_rows(made: Made) -> None:
    store, moe_layers = made
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        for i in range(100):
            moe = moe_layers[(seed + i) % len(moe_layers)]
            e = (3 * i + seed) % moe.num_experts
            row = new_row(moe)
            store.read(moe.index, e, view(row))
            assert_row(row, moe, e)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_close_is_idempotent_and_ends_reading(made: Made) -> None:
    store, moe_layers = made
    store.close()
    store.close()
    with pytest.raises(ClosedError, match="closed"):
        store.read(0, 0, view(new_row(moe_layers[0])))


def test_close_under_readers_gives_rows_or_closed_error(made: Made) -> None:
    store, moe_layers = made
    started = threading.Barrier(4)

    def work(_: int) -> str:
        started.wait()
        for i in range(100_000):
            e = i % moe_layers[0].num_experts
            row = new_row(moe_layers[0])
            try:
                store.read(0, e, view(row))
            except ClosedError:
                return "closed"
            assert_row(row, moe_layers[0], e)
        return "never closed"

    with ThreadPoolExecutor(3) as pool:
        outcomes = [pool.submit(work, i) for i in range(3)]
        started.wait()
        store.close()
        assert [outcome.result() for outcome in outcomes] == ["closed"] * 3
