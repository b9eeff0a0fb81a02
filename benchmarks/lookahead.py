"""Whether asking the next layer's router early pays: how often it is right, and what guesses do to the time of a token.

    python benchmarks/lookahead.py recall MODEL --texts TEXTS.json
    python benchmarks/lookahead.py pays FOLDER --routing TRACE.npz --residency 0.25 --recall 0.9

`recall` runs a real model over real text, and counts which of a layer's experts its guess had named.

`pays` decodes with recorded routing, where no router can be asked: the guess is the recorded ids of the next layer with
each replaced by another expert with probability 1 - recall, handed to the same `prefetch` that the pass calls. Steps
with and without guesses take turns, token by token. The router's own few microseconds are not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from moe_offload.apps.bench import routing as recorded
from moe_offload.apps.bench.request import random_prompt
from moe_offload.plan.budget import budget_for
from moe_offload.runtime.layer import LayerRuntime

PROMPT = 64  # tokens


def recall(options: argparse.Namespace) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    moe_offload.optimize(model, "4GB", device_map="cpu", config={"lookahead": True, "profile": "off"})
    guessed: dict[int, list[set[int]]] = {}
    asked: dict[int, list[set[int]]] = {}
    prefetch, event = LayerRuntime.prefetch, LayerRuntime._event

    def heard_prefetch(self: LayerRuntime, ids_P: Tensor) -> None:
        guessed.setdefault(self.moe.index, []).append(set(ids_P.flatten().tolist()))
        prefetch(self, ids_P)

    def heard_event(self: LayerRuntime, ids_P: Tensor) -> Any:
        asked.setdefault(self.moe.index, []).append(set(ids_P.flatten().tolist()))
        return event(self, ids_P)

    LayerRuntime.prefetch, LayerRuntime._event = heard_prefetch, heard_event  # type: ignore[method-assign]
    texts = json.loads(options.texts.read_text())
    for language, parts in texts.items():
        text = parts["evaluate"] if isinstance(parts, dict) else parts
        text = text if isinstance(text, str) else " ".join(text)
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : options.tokens]
        guessed.clear()
        asked.clear()
        cache = None
        with torch.no_grad():
            for t in range(ids.shape[1]):  # real text, a token at a time, as in decode
                cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        share = {
            layer: statistics.mean(len(a & g) / len(a) for a, g in zip(asked[layer], guesses, strict=True))
            for layer, guesses in sorted(guessed.items())
        }
        print(
            f"{language}: {statistics.mean(share.values()):.1%} of a layer's experts were named by the layer before",
            end="",
        )
        print(f" (by layer: {', '.join(f'{s:.0%}' for s in share.values())}; {ids.shape[1]} tokens)")


class Switch:
    """In place of the trial: the benchmark decides, step by step."""

    def __init__(self) -> None:
        self.on, self.paid = False, None

    def step(self, now_s: float) -> None: ...

    def skip(self) -> None: ...


class Guessing(recorded.Routing):
    """Replays, and tells the next layer what it will probably be asked for."""

    def __init__(self, replayed: recorded.Recorded, layers: list[LayerRuntime], right: float, tokens: int):
        super().__init__(replayed, [layer.moe.top_k for layer in layers], tokens, "cpu")
        self.layers, self.right, self.random = layers, right, torch.Generator().manual_seed(0)

    def __call__(self, ids_TK: Tensor, layer: int) -> Tensor:
        row = int(self.token_1)
        ids = super().__call__(ids_TK, layer)
        if layer + 1 < len(self.layers) and ids.shape[0] == 1 and self.recorded is not None:
            following = self.layers[layer + 1]
            guess = self.tables[layer + 1][row].clone()
            wrong = torch.rand(guess.shape, generator=self.random) > self.right
            guess[wrong] = torch.randint(following.moe.num_experts, (int(wrong.sum()),), generator=self.random)
            following.prefetch(guess)
        return ids


def pays(options: argparse.Namespace) -> None:
    whole = moe_offload.make_plan(options.model, 2**60)
    budget = budget_for(options.residency, whole.layers, whole.costs)
    model: Any = moe_offload.from_pretrained(options.model, budget, profile="off")
    layers = model.moe_offload._runtime.layers
    first = layers[0].moe
    replayed = recorded.load_recorded(options.routing, len(layers), first.num_experts, first.top_k)
    guessing = Guessing(replayed, layers, options.recall, PROMPT + options.tokens)
    guessing.seek(0, PROMPT + options.tokens)
    recorded.install_routing(model, [layer.moe.name for layer in layers], guessing)
    switch = model.moe_offload._runtime.guesses.trial = Switch()
    taken: dict[bool, list[float]] = {False: [], True: []}
    prompt = torch.tensor([random_prompt(model.config.get_text_config().vocab_size, PROMPT, 0)])
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        before = model.moe_offload.stats()
        for step in range(options.tokens):
            switch.on = step % 2 == 1
            begun = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if step >= 10:
                taken[switch.on].append(time.perf_counter() - begun)
    stats = model.moe_offload.stats() - before
    off, on = (statistics.median(taken[which]) * 1e3 for which in (False, True))
    means = [statistics.mean(taken[which]) * 1e3 for which in (False, True)]
    print(replayed.note)
    print(f"{options.residency:.0%} resident, {options.recall:.0%} of guesses right, {options.tokens} tokens")
    print(f"without {off:.1f} ms a token, with {on:.1f} ms ({on / off - 1:+.1%}); means {means[0]:.1f}, {means[1]:.1f}")
    print(f"{stats.ahead} rows ahead, {stats.late} of them late, {stats.wasted_bytes / 1e6:.0f} MB in vain")


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["recall", "pays"])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--texts", type=Path, help="JSON: {language: {evaluate: text}}")
    parser.add_argument("--routing", type=Path, help="trace (.npz)")
    parser.add_argument("--residency", type=float, default=0.25)
    parser.add_argument("--recall", type=float, default=0.886, help="others' figure for Qwen3-30B-A3B")
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    {"recall": recall, "pays": pays}[options.what](options)


if __name__ == "__main__":
    main()
