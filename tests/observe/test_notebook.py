"""What a notebook shows: well-formed, without script, and nothing of a hostile checkpoint gets out of its place."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

from tests.fakes.offloaded import offloaded, say

VOID = {"br", "img", "hr", "input", "meta", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of one block; fails where a tag is not closed in its turn."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def model():
    made = offloaded(layers=2)
    yield made
    made.moe_offload.close()


def test_it_shows_budget_layers_and_hit_rate(model):
    assert "nothing has run yet" in Page(model.moe_offload._repr_html_()).text
    say(model)
    page, stats = Page(model.moe_offload._repr_html_()), model.moe_offload.stats()
    assert f"{stats.hit_rate:.1%}" in page.text and f"{stats.hits + stats.misses} requests" in page.text
    for name, _ in model.moe_offload.plan.rows():
        assert name in page.text
    assert page.tags.count("tr") == 1 + 2 and f"2/2 of {stats.layers[0].experts}" in page.text
    widths = [value for name, value in page.attributes if name == "style" and "width:" in value and "%;" in value]
    shares = [float(value.split("width:")[1].split("%")[0]) for value in widths if "background" in value][:5]
    assert sum(shares) == pytest.approx(100, abs=0.1), "the bar is the whole budget"
    model.moe_offload.close()
    assert "closed" in Page(model.moe_offload._repr_html_()).text


def test_hostile_names_are_escaped(model):
    evil = "x\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    model.config._name_or_path = evil
    first = model.moe_offload._runtime.layers[0]
    first.moe = dataclasses.replace(first.moe, names=(evil,))
    assert model.moe_offload.stats().layers[0].name == evil == model.moe_offload.name
    page = Page(model.moe_offload._repr_html_())
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") or name == "src" for name, _ in page.attributes)
    assert evil in page.text and ("title", evil) in page.attributes
