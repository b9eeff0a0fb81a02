"""Record which experts a workload uses, look at the profile, and start with it: for texts in Italian and in English.

python examples/profile_a_workload.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moe_offload
from moe_offload.observe.profile import Profile
from moe_offload.observe.profile_stats import measure_distances, measure_skews

HERE = Path(__file__).parent
MODEL = HERE / "polyglot-tiny"


def main() -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    profiles = {}
    for language, pages in texts.items():
        batches = [tokenizer(page, return_tensors="pt", truncation=True, max_length=512) for page in pages["record"]]
        profiles[language] = moe_offload.record_profile(model, batches, language=language)

    for language, profile in profiles.items():
        hottest = sum(skew.top25 for skew in measure_skews(profile)) / len(measure_skews(profile))
        print(f"{language}: {profile.tokens} tokens; the hottest quarter of the experts has {hottest:.0%} of the uses")
    apart = measure_distances(profiles["it"], profiles["en"])
    print(f"how far apart they are, layer by layer: {', '.join(f'{d:.2f}' for d in apart)} (0 the same, 1 disjoint)\n")

    file = profiles["it"].save(Path(tempfile.mkdtemp()) / "italian.json")
    prompt = tokenizer(texts["it"]["evaluate"][0][:160], return_tensors="pt")
    for name, given in (("empty", "off"), ("Italian profile", Profile.load(file)), ("English profile", profiles["en"])):
        with moe_offload.from_pretrained(MODEL, budget="6MB", profile=given).moe_offload as handle:
            handle.model.generate(**prompt, max_new_tokens=1, do_sample=False)
            first = handle.stats()
            read, ahead = first.bytes_read / 1e6, first.prewarm_bytes / 1e6
            print(f"{name:<16} hits {first.hit_rate:.0%} of the prompt; {read:.2f} MB read for it, {ahead:.2f} before")


if __name__ == "__main__":
    main()
