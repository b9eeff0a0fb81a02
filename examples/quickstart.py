"""Run the bundled model in a budget it does not fit into: same tokens, hit rate, and what a profile changes.

python examples/quickstart.py [--budget 6MB]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moe_offload

HERE = Path(__file__).parent
MODEL = HERE / "polyglot-tiny"  # 11 MB: 4 layers of 64 experts, trained on manual pages in eight languages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="6MB")
    budget = parser.parse_args().budget
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    italian = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))["it"]
    prompt = tokenizer(italian["evaluate"][0][:160], return_tensors="pt")

    resident = AutoModelForCausalLM.from_pretrained(MODEL)
    want = resident.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
    print(f"resident    {tokenizer.decode(want[-24:])!r}")

    with moe_offload.from_pretrained(MODEL, budget=budget, profile="off").moe_offload as handle:
        got = handle.model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
        print(f"offloaded   {tokenizer.decode(got[-24:])!r}")
        print(f"tokens equal: {got.tolist() == want.tolist()}\n\n{handle}\n")

    pages = [tokenizer(page, return_tensors="pt", truncation=True, max_length=512) for page in italian["record"]]
    profile = moe_offload.record_profile(resident, pages, language="it")
    for name, given in (("cold start", "off"), ("Italian profile", profile)):
        with moe_offload.from_pretrained(MODEL, budget=budget, profile=given).moe_offload as handle:
            handle.model.generate(**prompt, max_new_tokens=32, do_sample=False)
            s = handle.stats()
            print(f"{name:<16} first 32 tokens: hit rate {s.hit_rate:.1%}, {s.bytes_read / 1e6:.2f} MB read on demand")


if __name__ == "__main__":
    main()
