"""How soon the second turn of a conversation begins: by what is known, beside its new tokens alone, and all of it anew.

python benchmarks/second_turn.py MODEL --budget 14MB --known 500 --new 20

Random tokens: what is measured is time, and it does not depend on what is said. The three are timed in turn, several
times, and what is printed are medians, in seconds until the first token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import moe_offload
from moe_offload.apps.prompt_cache.cache import PromptCache


def main() -> None:
    options = parse()
    model: Any = moe_offload.from_pretrained(options.model, options.budget, config={"profile": "off"})
    asked = {"do_sample": False, "pad_token_id": 0}
    vocabulary = model.config.get_text_config().vocab_size
    told = torch.randint(3, vocabulary, (1, options.known), generator=torch.Generator().manual_seed(0))
    new = torch.randint(3, vocabulary, (1, options.new), generator=torch.Generator().manual_seed(1))
    all_of_it = torch.cat([told, new], dim=1)
    prompts = PromptCache(model, tokens=4 * options.known)

    def first_token_s(generate: Any, ids: torch.Tensor) -> float:
        begun_s = time.perf_counter()
        generate(ids, max_new_tokens=1, **asked)
        return time.perf_counter() - begun_s

    found: dict[str, list[float]] = {"second turn": [], "its new tokens alone": [], "all of it anew": []}
    with model.moe_offload:
        for _ in range(options.rounds + 1):
            prompts.forget()
            prompts.generate(told, max_new_tokens=1, **asked)
            found["second turn"].append(first_token_s(prompts.generate, all_of_it))
            known = prompts.known_tokens
            model.generate(told, max_new_tokens=1, **asked)  # so that what it leaves in the slots is the same
            found["its new tokens alone"].append(first_token_s(model.generate, new))
            model.generate(told, max_new_tokens=1, **asked)
            found["all of it anew"].append(first_token_s(model.generate, all_of_it))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}  # the first round compiles
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s")
    print(
        f"{known} of {all_of_it.shape[1]} tokens known; {medians['second turn'] / medians['its new tokens alone']:.2f}x"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--known", type=int, default=500, help="tokens that were said")
    parser.add_argument("--new", type=int, default=20, help="tokens of the second message")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
