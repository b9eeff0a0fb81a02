"""How often an answer that goes on from a known beginning has other tokens than a fresh run, and by how near a tie.

python benchmarks/known_beginnings.py MODEL --budget 20MB --dtype bfloat16 --conversations 35

Prompts of random tokens with shared and diverging beginnings; an interrupt ends some answers. Each other answer is
compared with plain transformers' `generate` from nothing, and its logits with plain transformers that is handed the
same KV cache, which are the same to the bit. The gap is how far the token of the answer lies below the best one, in the
logits of the fresh run. Random texts have near ties more often than texts do. The last line is of plain transformers
alone: half of a prompt token by token, beside all of it at once.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria

import moe_offload
from moe_offload.apps.prompt_cache.cache import PromptCache

REQUESTS, CONTEXT = 40, 1024  # of a conversation


class Interrupt(StoppingCriteria):
    """Ctrl-C when so many tokens were generated."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.tokens -= 1
        if self.tokens <= 0:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)


def main() -> None:
    options = parse()
    plain: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    model: Any = moe_offload.from_pretrained(
        options.model, options.budget, dtype=options.dtype, config={"profile": "off"}
    )
    answers, went_on, gaps = 0, 0, []
    with model.moe_offload:
        for seed in range(options.conversations):
            for known, gap in talk(model, plain, random.Random(seed)):
                answers, went_on = answers + 1, went_on + (known > 0)
                gaps += [] if gap is None else [round(gap, 3)]
    print(f"{answers} answers, {went_on} of them from a known beginning; {len(gaps)} with other tokens")
    print(f"gaps: {sorted(gaps)}")
    compare_pieces(plain, options.prompts)


def talk(model: Any, plain: Any, chance: random.Random) -> Any:
    """For each answer that was not interrupted: tokens known, and the gap where its tokens are others, else None."""
    prompts, told = PromptCache(model, CONTEXT), []
    lend, lent = prompts._lend, {}

    def lend_and_copy(*asked: Any) -> Any:
        cache, known = lend(*asked)
        lent["cache"] = copy.deepcopy(cache)
        return cache, known

    prompts._lend = lend_and_copy  # type: ignore[method-assign]
    for _ in range(REQUESTS):
        ids = draw(chance, told, model.config.get_text_config().vocab_size)
        input_ids, new = torch.tensor([ids]), chance.randint(1, 24)
        asked = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if chance.random() < 0.3:
            try:
                prompts.generate(input_ids, **asked, stopping_criteria=[Interrupt(chance.randint(1, new))])
            except KeyboardInterrupt:
                pass
            told.append(ids)
            continue
        asked |= {"return_dict_in_generate": True, "output_logits": True}
        ours, fresh = prompts.generate(input_ids, **asked), plain.generate(input_ids, **asked)
        handed = plain.generate(input_ids, past_key_values=lent["cache"], **asked)
        if not all(torch.equal(a, b) for a, b in zip(ours.logits, handed.logits, strict=True)):
            raise SystemExit(f"not what plain transformers gives with the same KV cache: {ids}")
        told.append(ours.sequences[0].tolist())
        yield prompts.known_tokens, gap_of(ours, fresh, len(ids))


def draw(chance: random.Random, told: list[list[int]], vocabulary: int) -> list[int]:
    """A prompt that begins as some text before it, or a new one."""
    if told and chance.random() < 0.75:
        text = chance.choice(told)
        begin = text[: chance.randint(1, len(text))]
        return (begin + [chance.randrange(3, vocabulary) for _ in range(chance.randint(0, 25))])[:400]
    return [chance.randrange(3, vocabulary) for _ in range(chance.randint(2, 120))]


def gap_of(ours: Any, fresh: Any, begin: int) -> float | None:
    """How far our first other token lies below the best one in the fresh run; None where there is none."""
    pairs = zip(ours.sequences[0, begin:].tolist(), fresh.sequences[0, begin:].tolist(), strict=False)
    for i, (one, other) in enumerate(pairs):
        if one != other:
            logits = fresh.logits[i][0].float()
            return float(logits.max() - logits[one])
    return None


@torch.no_grad()
def compare_pieces(plain: Any, prompts: int) -> None:
    """How far the logits after a prompt move when its second half is read token by token, by plain transformers."""
    generator, moved, others = torch.Generator().manual_seed(0), [], 0
    for _ in range(prompts):
        tokens = int(torch.randint(40, 110, (1,), generator=generator))
        ids = torch.randint(3, plain.config.get_text_config().vocab_size, (1, tokens), generator=generator)
        cache, half = DynamicCache(config=plain.config), tokens // 2
        out = plain(ids[:, :half], past_key_values=cache)
        for i in range(half, tokens):
            out = plain(ids[:, i : i + 1], past_key_values=cache)
        one, other = plain(ids).logits[0, -1].float(), out.logits[0, -1].float()
        moved.append(float((one - other).abs().max()))
        others += int(one.argmax() != other.argmax())
    moved.sort()
    median, many = statistics.median(moved), moved[int(0.97 * len(moved))]
    print(f"plain transformers, {prompts} prompts, half of each token by token: {others} best tokens are others")
    print(f"their logits move by {median:.3f} in the median, by {many:.3f} in one of 33, by {moved[-1]:.3f} at most")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--conversations", type=int, default=35, help=f"of {REQUESTS} requests each")
    parser.add_argument("--prompts", type=int, default=400, help="of the comparison of plain transformers alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
