"""Prometheus metrics: over HTTP they say what stats() says, and whatever happens to them the model runs on."""

from __future__ import annotations

import builtins
import gc
import importlib
import logging
import os
import signal
import socket
import time
import urllib.request
import weakref

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from moe_offload import ClosedError, ConfigError, OffloadError
from moe_offload.apps.cli import app
from moe_offload.observe.metrics import check_port
from tests.fakes.offloaded import offloaded, say
from tests.paths import MODEL_NAME as MODEL


@pytest.fixture(scope="module")
def used():
    model = offloaded(layers=2, residency=0.5)
    say(model)
    for layer in model.moe_offload._runtime.layers:  # what did not happen here: no two counters are equal
        c = layer.cache.counters
        c.ahead, c.late, c.prewarm_bytes, c.wasted_bytes = 5, 3, 7, 11
    yield model
    model.moe_offload.close()


def scrape(url: str) -> dict[tuple[str, str | None], float]:
    """{(metric, layer): value}"""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["model"] for sample in samples} <= {"Qwen3MoeForCausalLM"}
    found = {(sample.name, sample.labels.get("layer")): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def expected(model, totals=None) -> dict[str, float]:
    handle = model.moe_offload
    s = handle.stats() if totals is None else totals
    return {
        "moe_offload_hits_total": s.hits,
        "moe_offload_misses_total": s.misses,
        "moe_offload_streamed_total": s.streamed,
        "moe_offload_events_total": s.events,
        "moe_offload_device_events_total": s.by_device,
        "moe_offload_read_bytes_total": s.bytes_read,
        "moe_offload_prewarm_bytes_total": s.prewarm_bytes,
        "moe_offload_prefetch_useful_total": s.ahead,
        "moe_offload_prefetch_late_total": s.late,
        "moe_offload_prefetch_wasted_bytes_total": s.wasted_bytes,
        "moe_offload_stall_seconds_total": pytest.approx(s.stall_s),
        "moe_offload_tokens_total": s.tokens,
        "moe_offload_resident_bytes": handle.plan.bank_bytes,
        "moe_offload_slot_bytes": handle.plan.bank_bytes,
        "moe_offload_budget_bytes": handle.plan.budget_bytes,
    }


def test_over_http_they_are_what_stats_says(used):
    found = scrape(used.moe_offload.serve_metrics(0))
    assert found == {(name, None): value for name, value in expected(used).items()}
    assert found["moe_offload_hits_total", None] > 0 < found["moe_offload_read_bytes_total", None]


def test_per_layer(used):
    found = scrape(used.moe_offload.serve_metrics(0, per_layer=True))
    for i, layer in enumerate(used.moe_offload.stats().layers):
        assert found["moe_offload_hits_total", str(i)] == layer.hits
        assert found["moe_offload_misses_total", str(i)] == layer.misses
    assert found["moe_offload_tokens_total", None] == used.moe_offload.stats().tokens
    assert {layer for _, layer in found} == {"0", "1", None}


def test_they_move_with_the_model(used):
    registry, labels = used.moe_offload.metrics(), {"model": used.moe_offload.name}
    before = registry.get_sample_value("moe_offload_tokens_total", labels)
    say(used, n=5)
    assert registry.get_sample_value("moe_offload_tokens_total", labels) == before + 12 + 4


def test_mounted_in_an_application(used):
    from prometheus_client import make_asgi_app
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    served = Starlette()
    served.mount("/metrics", make_asgi_app(used.moe_offload.metrics()))
    text = TestClient(served).get("/metrics/").text
    assert f'moe_offload_hits_total{{model="{used.moe_offload.name}"}} {float(used.moe_offload.stats().hits)}' in text


def test_an_error_while_collecting_is_no_sample_and_one_warning(used, monkeypatch, caplog):
    url = used.moe_offload.serve_metrics(0)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "moe_offload"):
        broken.setattr(used.moe_offload, "stats", lambda: 1 / 0)
        assert scrape(url) == {} == scrape(url)
    assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text
    assert scrape(url)


def test_close_gives_the_port_back():
    model = offloaded()
    url, registry = model.moe_offload.serve_metrics(0), model.moe_offload.metrics()
    assert scrape(url)
    model.moe_offload.close()
    with pytest.raises(OSError):
        scrape(url)
    assert list(registry.collect()) == []
    with pytest.raises(ClosedError):
        model.moe_offload.serve_metrics(0)


def test_an_exporter_keeps_no_model_alive():
    model = offloaded()
    url, gone = model.moe_offload.serve_metrics(0), weakref.ref(model)
    assert scrape(url)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(OSError):
        scrape(url)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_that_closes_does_not_hang(used):
    url = used.moe_offload.serve_metrics(0)
    child = os.fork()
    if child == 0:
        used.moe_offload._exporters[-1].close()
        os._exit(7)
    end, done = time.monotonic() + 120, (0, 0)
    while done == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
        done = os.waitpid(child, os.WNOHANG)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(done[1]) == 7
    assert scrape(url)


def test_a_port_in_use_is_one_line(used):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for start in (used.moe_offload.serve_metrics, check_port):
            with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
                start(port)
        result = CliRunner().invoke(app, ["run", MODEL, "--budget", "6MB", "--metrics-port", str(port)])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "is in use" in result.stderr
    for port, addr in ((70000, "127.0.0.1"), (9100, "203.0.113.7")):
        for start in (used.moe_offload.serve_metrics, check_port):
            with pytest.raises(ConfigError, match="cannot listen"):
                start(port, addr)


def test_a_wrong_port_is_exit_code_2():
    for port in ("0", "70000", "many"):
        assert CliRunner().invoke(app, ["run", MODEL, "--metrics-port", port]).exit_code == 2


def test_without_the_package_the_error_says_what_to_install(used, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for ask in (used.moe_offload.metrics, lambda: used.moe_offload.serve_metrics(0), lambda: check_port(9100)):
        with pytest.raises(OffloadError, match=r'pip install -e "\.\[metrics\]"'):
            ask()


def test_run_serves_metrics(monkeypatch):
    command = importlib.import_module("moe_offload.apps.generate.run")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, seen, generate = f"http://127.0.0.1:{port}/metrics", [], command.generate_into

    def generate_and_look(*arguments):
        generate(*arguments)
        seen.append(urllib.request.urlopen(url, timeout=30).read())

    monkeypatch.setattr(command, "generate_into", generate_and_look)
    flags = ["--budget", "6MB", "--prompt", "ls", "--max-new-tokens", "2", "--metrics-port", str(port)]
    result = CliRunner().invoke(app, ["run", MODEL, *flags])
    assert result.exit_code == 0 and url in result.stderr, result.output
    assert b'moe_offload_tokens_total{model="polyglot-tiny"} ' in seen[0]
