"""How an offloaded model can be watched from outside its process: by `moe-offload top`, and by Prometheus."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from ..observe.live.server import LiveView, open_view
from ..observe.metrics import LOCAL, Exporter, registry_of
from .state import State


class Watching(State):
    """The live view and the metrics; both end with the model."""

    _live: LiveView | None = None
    _exporters: tuple[Exporter, ...] = ()

    def serve_live(self) -> Path | None:
        """Let `moe-offload top` watch this model, until it is closed. It costs nothing while nobody looks.

        Returns:
            The path of the socket; None where there can be none. That is logged, and the model runs on.

        Raises:
            ClosedError: The model was closed.

        Example:

            ```python
            model.moe_offload.serve_live()  # and in another terminal: moe-offload top
            ```
        """
        self._runtime.check_open()
        if self._live is None:
            this = weakref.ref(self)  # the view must not keep a model alive that nobody else needs
            self._live = open_view(lambda: _live_line(this()))
            if self._live is not None:
                weakref.finalize(self, self._live.close)
        return None if self._live is None else self._live.path

    def metrics(self, per_layer: bool = False) -> Any:
        """The counters as Prometheus metrics, read when they are scraped.

        Args:
            per_layer: Whether each layer has samples of its own, with a label `layer`.

        Returns:
            A `prometheus_client.CollectorRegistry` of this model alone.

        Raises:
            OffloadError: prometheus_client is missing (the extra `metrics`).

        Example:

            ```python
            app.mount("/metrics", prometheus_client.make_asgi_app(model.moe_offload.metrics()))
            ```
        """
        return registry_of(self, per_layer)

    def serve_metrics(self, port: int, addr: str = LOCAL, per_layer: bool = False) -> str:
        """Serve `metrics()` over HTTP, from a thread of its own, until the model is closed.

        Args:
            port: 1 to 65535, or 0 for one that is free.
            addr: The address to listen on; 127.0.0.1 by default, which only this machine reaches.
            per_layer: As in `metrics`.

        Returns:
            The URL.

        Raises:
            ConfigError: The port cannot be had.
            OffloadError: prometheus_client is missing (the extra `metrics`).
            ClosedError: The model was closed.

        Example:

            ```python
            print(model.moe_offload.serve_metrics(9100))
            ```
        """
        self._runtime.check_open()
        exporter = Exporter(self.metrics(per_layer), port, addr)
        self._exporters += (exporter,)
        weakref.finalize(self, exporter.close).atexit = False  # its thread ends with the process
        return exporter.url

    def _end_watching(self) -> None:
        if self._live is not None:
            self._live.close()
        for exporter in self._exporters:
            exporter.close()
        self._exporters = ()


def _live_line(state: State | None) -> bytes | None:
    return None if state is None or state.closed else state._snapshot().to_json()
