"""What a rank does in the tests of this folder: each function runs on all ranks, in a group of their own."""

import os
import signal
import socket
import time
import unittest.mock

import torch
import transformers

import moe_offload
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from moe_offload.ranks import peers, store
from moe_offload.ranks.call import exchanging
from moe_offload.ranks.join import config_of_ranks, form_ranks
from moe_offload.ranks.orders import Orders

ONE, THREE = torch.arange(3, 15).view(1, -1), torch.arange(3, 33).view(3, -1)
TEXT = "The ls command lists"
CONFIG = {"poison": True, "kv_tokens": 64, "wave_rows": 1, "rank_timeout": 60.0, "profile": "off"}


def settings(**changed):
    return moe_offload.OffloadConfig(**{**CONFIG, **changed})


def plain(folder, world, implementation="grouped_mm", exchange="auto"):
    """transformers' own model, split over the ranks."""
    how = {**config_of_ranks(world, transformers.AutoConfig.from_pretrained(folder)), "ep_implementation": exchange}
    form_ranks(how, settings())
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=how, experts_implementation=implementation
    )


def ours(folder, world, residency=0.5, exchange="auto", **changed):
    """The same, of which each rank keeps a cache of this share of its experts."""
    how = {**config_of_ranks(world, transformers.AutoConfig.from_pretrained(folder)), "ep_implementation": exchange}
    wanted = settings(**changed)
    return moe_offload.from_pretrained(
        folder, budget_of(folder, residency, wanted, how), config=wanted, distributed_config=how
    )


def budget_of(folder, residency, wanted, how):
    """Bytes that hold this share of a rank's experts."""
    from pathlib import Path

    from moe_offload.checkpoint.outline import outline_folder
    from moe_offload.checkpoint.pretrained.split import split_outline

    form_ranks(how, wanted)
    found = split_outline(outline_folder(Path(folder)), how)
    return budget_for(residency, layer_shapes(found.moe_layers), sum_costs(found.model, found.moe_layers, wanted))


def say(model, new=12):
    """Logits of a prompt, tokens of one sequence and of three."""
    logits = model(ONE).logits
    return [
        logits.full_tensor() if hasattr(logits, "full_tensor") else logits,
        *(model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0) for ids in (ONE, THREE)),
    ]


def says_what_transformers_says(rank, world, folder, implementation, exchange, residencies, new=12):
    """Bits against transformers' own run on the same ranks; tokens, counters. A residency is of all ranks, or a pair:
    of rank 0, and of the others."""
    with torch.no_grad():
        want = say(plain(folder, world, implementation, exchange), new)
        found = []
        for residency in residencies:
            own = residency[min(rank, 1)] if isinstance(residency, list) else residency
            model = ours(folder, world, own, exchange, experts_implementation=implementation)
            got = say(model, new)
            stats = model.moe_offload.stats()
            found.append(
                {
                    "same": [torch.equal(a, b) for a, b in zip(want, got, strict=True)],
                    "tokens": [ids.tolist() for ids in got[1:]],
                    "slots": list(model.moe_offload.plan.slots),
                    "hits": stats.hits,
                    "misses": stats.misses,
                }
            )
            model.moe_offload.close()
    return found


def agrees_and_tries_again(rank, world, folder):
    """Rank 1 has too small a budget: both refuse, and both load the model afterwards. With `optimize` as well."""
    how = config_of_ranks(world)
    small, enough = ("100KB" if rank == 1 else "50MB"), "50MB"
    errors = []
    for again in (False, True):
        try:
            model = moe_offload.from_pretrained(
                folder, enough if again else small, config=settings(), distributed_config=how
            )
        except moe_offload.OffloadError as error:
            errors.append(f"{type(error).__name__}: {error}")
    text = model.generate(ONE, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    model.moe_offload.close()
    loaded = plain(folder, world)
    try:
        moe_offload.optimize(loaded, small, config=settings())
    except moe_offload.OffloadError as error:
        errors.append(f"{type(error).__name__}: {error}")
    moe_offload.optimize(loaded, enough, config=settings())
    again = loaded.generate(ONE, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    return errors, text == again


def is_refused_before_they_meet(rank, world, folder, refused):
    """What one rank cannot read as a budget, or as an argument, before it has a group: all refuse, and all load the
    model afterwards. With `optimize` as well. The errors, the timeouts after each, and whether the tokens are alike."""
    how, errors, timeouts = config_of_ranks(world), [], []

    within = settings(rank_timeout=45.0)

    def load(budget="50MB", **more):
        return moe_offload.from_pretrained(folder, budget, config=within, distributed_config=how, **more)

    wrong = [{"budget": "plenty"}, {"no_such_argument": 1}]
    errors += [error_of(lambda more=more: load(**(more if rank == refused else {}))) for more in wrong]
    model = load()
    timeouts.append(model.moe_offload.ranks.timeout_s)
    errors.append(error_of(lambda: load(**(wrong[0] if rank == refused else {}))))
    timeouts.append(model.moe_offload.ranks.timeout_s)  # which goes on beside what was refused
    text = model.generate(ONE, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    model.moe_offload.close()
    loaded = plain(folder, world)
    budget = "plenty" if rank == refused else "50MB"
    errors.append(error_of(lambda: moe_offload.optimize(loaded, budget, config=within)))
    timeouts.append(moe_offload.optimize(loaded, "50MB", config=within).moe_offload.ranks.timeout_s)
    again = loaded.generate(ONE, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    return errors, timeouts, text == again


def answers_as_one_process(rank, world, requests):
    """What rank 0 answers to requests, as `serve` does; the others follow. The text of each, and how many followed."""
    from transformers import AutoTokenizer, GenerationConfig

    from moe_offload.apps.serving.generation import Sampling
    from moe_offload.apps.serving.in_step import Leader, follow
    from tests.paths import MODEL_NAME

    model = moe_offload.from_pretrained(
        MODEL_NAME, "8MB", config=settings(kv_tokens=128), distributed_config=config_of_ranks(world)
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL_NAME)
    if rank:
        follow(model, tokenizer, lambda: None)
        return model.moe_offload.stats().tokens
    leader, texts = Leader(model.moe_offload.ranks), []
    for asked in requests:
        pieces, most = [], asked.pop("gone_after", 10**6)
        config = GenerationConfig(**asked.pop("config"), pad_token_id=0)
        biases = {int(token): bias for token, bias in asked.pop("logit_bias", {}).items()}
        sampling = Sampling(config, tuple(asked.pop("stop", ())), asked.pop("seed", None), logit_bias=biases, **asked)
        try:
            leader.generate(
                model,
                tokenizer,
                tokenizer(TEXT)["input_ids"],
                sampling,
                lambda: None,
                pieces.append,
                lambda pieces=pieces, most=most: len(pieces) >= most,
            )
            texts.append("".join(piece.text for piece in pieces))
        except ValueError as error:
            texts.append(f"{type(error).__name__}")
    leader.end(None)
    return texts, model.moe_offload.stats().tokens


def runs_something_else(rank, world, folder, other):
    """Rank 1 has other settings, another version, another checkpoint, too many budgets; then all have the same."""
    how, refused = config_of_ranks(world), []

    def load(path=folder, budget="50MB", **changed):
        return moe_offload.from_pretrained(path, budget, config={**CONFIG, **changed}, distributed_config=how)

    if rank:
        with unittest.mock.patch.object(peers, "version", lambda name: f"{name} of another year"):
            refused.append(error_of(load))
        refused += [error_of(lambda: load(other)), error_of(lambda: load(compute="packed"))]
    else:
        refused += [error_of(load) for _ in range(3)]
    refused.append(error_of(lambda: load(budget=["40MB", "50MB", "60MB"])))
    budgets = []
    with unittest.mock.patch.dict(os.environ, {"MOE_OFFLOAD_BUDGET": f"{40 + rank}MB"}):
        for budget in (["30MB", "31MB"], "20MB, 21MB", None):
            model = load(budget=budget)
            budgets.append(model.moe_offload.plan.budget_bytes)
            model.moe_offload.close()
    return refused, budgets


def rank_0_stops(rank, world, within_call):
    """Rank 0, which holds the store, is stopped: what do the others hear, who wait for it in one way or another?"""
    store.PATIENCE = 4  # looks; more take longer, and find the same
    group = form_ranks(config_of_ranks(world), settings())
    orders = Orders(group, "x")
    with exchanging(group):
        torch.distributed.all_reduce(torch.ones(1))
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if within_call:
            torch.distributed.all_reduce(torch.ones(1))
    waits = (lambda: group.exchange("x", rank, "say x"), orders.take, group.check)
    return [error_of(wait) for wait in waits]


def rank_0_is_stopped_before(rank, world):
    """The store is there, and nobody answers: a rank that comes to it later gives up."""
    where = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    if rank == 0:
        held = torch.distributed.TCPStore(*where, is_master=True, wait_for_workers=False)
        os.kill(os.getpid(), signal.SIGSTOP)
        del held
    while socket.socket().connect_ex(where):
        time.sleep(0.1)
    time.sleep(1)  # for rank 0 to stop
    return error_of(lambda: form_ranks(config_of_ranks(world), settings(rank_timeout=2.0)))


def error_of(wait):
    try:
        return f"no error: {wait()}"
    except moe_offload.OffloadError as error:
        return f"{type(error).__name__}: {error}"
