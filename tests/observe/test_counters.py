"""Counters are declared once: whatever shows them derives from the declaration."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from moe_offload.cache.counters import ABOUT, COUNTERS, Counters, LayerCounters, Stats
from moe_offload.observe.summary import summary_of
from tests.paths import ROOT

#: With one more line in the declaration, and no other change, the counter is everywhere.
ONE_LINE = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

class WithOneMore(SourceFileLoader):
    def get_code(self, name):
        source = Path(self.path).read_text()
        line = '    weighed: int = _count("Rows that were weighed", "weighed")\\n'
        assert source.count("    hits: int = ") == 1
        return compile(source.replace("    hits: int = ", line + "    hits: int = "), self.path, "exec")

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "moe_offload.cache.counters":
            return None
        spec = super().find_spec(name, path, target)
        spec.loader = WithOneMore(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder)

from moe_offload.apps.live.rates import rates_between
from moe_offload.apps.report.collect import collect_run
from moe_offload.apps.report.run_record import RunRecord
from moe_offload.cache.counters import LayerCounters
from moe_offload.observe.live.snapshot import Snapshot
from moe_offload.runtime.kernels.state_block import StateBlock
from tests.fakes.offloaded import offloaded, say

model = offloaded(layers=2)
handle = model.moe_offload
handle.start_trace()
say(model, n=3)
for layer in handle._runtime.layers:
    layer.cache.counters.weighed += 3
stats = handle.stats()
assert stats.weighed == 6 and [layer.weighed for layer in stats.layers] == [3, 3]
assert (stats - stats).weighed == 0 and stats.values()["weighed"] == 6
assert handle.snapshot()["weighed"] == 6
assert Snapshot.of(handle._snapshot().to_json()).layers[1].weighed == 3
labels = {"model": handle.name}
assert handle.metrics().get_sample_value("moe_offload_weighed_total", labels) == 6
assert handle.metrics(True).get_sample_value("moe_offload_weighed_total", {**labels, "layer": "1"}) == 3
assert [forward.weighed for forward in handle.forwards()] == [0, 0, 6]
run = collect_run(handle, model="m")
assert run.forwards[-1].weighed == 6 and run.layers[0].weighed == 3
assert RunRecord.model_validate_json(run.model_dump_json()) == run
known = LayerCounters(weighed=3, counts=[0] * 4)
assert StateBlock([(4, 2)], "cpu").states[0].counters(known, 2, 10).weighed == 3
print("everywhere")
"""


def test_a_new_counter_is_one_line():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ONE_LINE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "everywhere\n", done.stderr


def test_each_has_a_sentence_and_a_metric_of_its_own():
    assert len({about["metric"] for about in ABOUT.values()}) == len(COUNTERS)
    for name, about in ABOUT.items():
        assert re.match(r"[A-Z].*\w$", about["description"]), name
        assert about["metric"].endswith(about["unit"]), f"{name}: Prometheus wants the unit at the end"
        assert about["combine"] in ("sum", "max")


def test_over_layers_and_between_two_looks():
    first, second = Counters(tokens=3, hits=5, stall_s=0.5), Counters(tokens=3, hits=7, stall_s=0.25, misses=4)
    both = Counters.total([first, second])
    assert both == Counters(tokens=3, hits=12, misses=4, stall_s=0.75), "each token goes through every layer"
    assert both - first == Counters(hits=7, misses=4, stall_s=0.25) and (both - first) + first == both
    assert Counters.total([]) == Counters() and (both.requests, both.hit_rate) == (16, 0.75)
    assert Counters(bytes_read=1, prewarm_bytes=2, wasted_bytes=4).moved_bytes == 7
    assert Stats(hits=3, graphs=2) - Stats(hits=1, graphs=1) == Stats(hits=2, graphs=1)


def test_uses_and_tokens_change_at_once():
    """Ctrl-C at any line, or another thread: there are never more uses than their tokens allow."""
    counters, seen = LayerCounters(counts=[0, 0]), set()

    def look(frame, event, argument):
        seen.add((counters.events, counters.tokens, tuple(counters.counts)))
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        counters.count_event({0: 2, 1: 1}, 2)
    finally:
        sys.settrace(before)
    assert seen == {(0, 0, (0, 0)), (1, 2, (2, 1))}


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        (Stats(), ["nothing has run yet"]),
        (Stats(tokens=4, hits=3, misses=1, bytes_read=2000), ["hit rate 75.0% (3 hits, 1 misses", "2.00 KB read"]),
        (Stats(hits=1, ahead=5, late=2, wasted_bytes=10), ["read ahead: 5 rows", "2 of them late"]),
    ],
)
def test_the_summary(stats, says):
    text = summary_of(stats)
    assert all(words in text for words in says) and not text.endswith("\n"), text
