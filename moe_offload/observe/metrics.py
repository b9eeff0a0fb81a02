"""Prometheus metrics of one model, read from its counters when somebody scrapes: nothing is counted twice.

    registry = model.moe_offload.metrics()           to mount: prometheus_client.make_asgi_app(registry)
    model.moe_offload.serve_metrics(9100)            or served by a thread of its own

Each model has a registry of its own, so that two models in a process do not clash, and nothing else is exported with
them. What goes wrong while scraping is one warning and no sample; the model does not notice.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from ..cache.counters import ABOUT, LayerStats
from ..errors import ConfigError, OffloadError
from .watched import Watched

logger = logging.getLogger("moe_offload")

LOCAL = "127.0.0.1"


def registry_of(handle: Watched, per_layer: bool = False) -> Any:
    """A `CollectorRegistry` of this model alone. Raises OffloadError without prometheus_client."""
    registry = _prometheus().CollectorRegistry(auto_describe=False)
    registry.register(Collector(handle, per_layer))
    return registry


class Collector:
    """Reads `stats()` at each scrape. It does not keep the model alive; of a closed one there are no samples."""

    def __init__(self, handle: Watched, per_layer: bool = False):
        self._handle, self._per_layer, self._warned = weakref.ref(handle), per_layer, False

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        try:
            handle = self._handle()
            return [] if handle is None or handle.closed else list(_families(handle, self._per_layer))
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("metrics could not be collected: %s: %s", type(error).__name__, error)
            return []


def _families(handle: Watched, per_layer: bool) -> Iterable[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    stats, labels = handle.stats(), ["model", "layer"] if per_layer else ["model"]

    def samples(family: Any, value: Callable[[LayerStats], float]) -> Any:
        if per_layer:
            for i, layer in enumerate(stats.layers):
                family.add_metric([handle.name, str(i)], value(layer))
        else:
            family.add_metric([handle.name], sum(map(value, stats.layers)))
        return family

    def of_model(family: Any, value: float) -> Any:
        family.add_metric([handle.name], value)
        return family

    for name, about in ABOUT.items():
        metric, description, unit = f"moe_offload_{about['metric']}", about["description"], about["unit"]
        if about["combine"] == "sum":
            yield samples(CounterMetricFamily(metric, description, None, labels, unit=unit), attrgetter(name))
        else:  # every layer has counted the same ones: a sum over layers would be wrong
            yield of_model(CounterMetricFamily(metric, description, None, ["model"], unit=unit), getattr(stats, name))
    resident = GaugeMetricFamily("moe_offload_resident_bytes", "Bytes of experts in slots now", labels=labels)
    yield samples(resident, lambda layer: layer.resident * layer.row_bytes)
    slots = GaugeMetricFamily("moe_offload_slot_bytes", "Bytes that slots take", labels=labels)
    yield samples(slots, lambda layer: layer.slots * layer.row_bytes)
    budget = GaugeMetricFamily("moe_offload_budget_bytes", "What the model may hold", labels=["model"])
    yield of_model(budget, handle.plan.budget_bytes)


class Exporter:
    """An HTTP server of a registry, in a daemon thread. Raises ConfigError where the port cannot be had."""

    def __init__(self, registry: Any, port: int, addr: str):
        check_port(port, addr)
        try:
            self._server, self._thread = _prometheus().start_http_server(port, addr, registry)
        except OSError as error:
            raise _refused(port, addr, error) from error
        self._pid = os.getpid()
        host = f"[{addr}]" if ":" in addr else addr
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Give the port back. Idempotent."""
        if os.getpid() == self._pid and self._thread is not threading.current_thread():  # a forked child has no thread
            self._server.shutdown()
        self._server.server_close()


def check_port(port: int, addr: str = LOCAL) -> None:
    """Raise ConfigError where an exporter could not be started there, OffloadError without prometheus_client: before
    minutes of loading, not after."""
    _prometheus()
    if not 0 <= port <= 65535:  # beyond, getaddrinfo counts from 0 again
        raise ConfigError(f"metrics: cannot listen on port {port}: ports are 1 to 65535, or 0 for one that is free")
    try:
        family, kind, _, _, where = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise _refused(port, addr, error) from error


def _refused(port: int, addr: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"metrics: port {port} on {addr} is in use by another program; choose another port")
    return ConfigError(f"metrics: cannot listen on port {port} of {addr}: {error}")


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise OffloadError('metrics need prometheus_client: in the clone, pip install -e ".[metrics]"') from error
    return prometheus_client
