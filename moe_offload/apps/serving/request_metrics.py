"""Metrics of the requests, for Prometheus and for the log: counts, how many wait, latencies."""

from __future__ import annotations

import logging
from typing import Any

from . import ACCESS
from .queue import Job, Queue

access = logging.getLogger(ACCESS)

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
OTHER = "other"  # a label has few values, whatever is asked for


class RequestMetrics:
    """Counts requests as they end. Without `registry` (no prometheus_client) it only writes the log.

    Args:
        registry: a `prometheus_client.CollectorRegistry`, or None.
        queue: whose length is read when somebody scrapes.
        paths: the paths that there are.
    """

    def __init__(self, registry: Any, queue: Queue, paths: set[str]):
        self._paths, self._registry = paths, registry
        if registry is None:
            return
        from prometheus_client import Counter, Gauge, Histogram

        def make(kind: Any, name: str, what: str, **options: Any) -> Any:
            return kind(f"moe_offload_serve_{name}", what, registry=registry, **options)

        self._requests = make(Counter, "requests", "Requests that have ended", labelnames=("path", "status"))
        self._prompt = make(Counter, "prompt_tokens", "Tokens of prompts of generating requests")
        self._known = make(Counter, "known_tokens", "Tokens of prompts that were in a KV cache, and not read again")
        self._generated = make(Counter, "generated_tokens", "Tokens generated for requests")
        make(Gauge, "waiting", "Requests that wait for their turn").set_function(lambda: len(queue))
        make(Gauge, "running", "Requests that are being generated").set_function(lambda: len(queue.running))
        self._first = make(
            Histogram, "first_token_seconds", "From a request's arrival to its first token", buckets=FIRST_TOKEN_S
        )
        self._token = make(
            Histogram, "token_seconds", "Per token after the first, averaged over a request", buckets=TOKEN_S
        )

    def ended(self, client: str, method: str, path: str, status: int, job: Job | None) -> None:
        """A request has ended, with `status`; 499: its client has left before the end."""
        line = f"{client} {method} {path} {status}"
        first_s = token_s = 0.0
        if job is not None:
            known = f" known_tokens={job.known_tokens}" if job.known_tokens else ""
            line += f" prompt_tokens={job.prompt_tokens}{known} generated_tokens={job.generated_tokens}"
            if job.generated_tokens > 0:
                first_s = job.first_token_s - job.asked_s
                line += f" first_token_s={first_s:.3f}"
            if job.generated_tokens > 1:
                token_s = (job.last_token_s - job.first_token_s) / (job.generated_tokens - 1)
                line += f" tokens_per_s={1 / max(token_s, 1e-9):.2f}"
        access.info(line)
        if self._registry is None:
            return
        self._requests.labels(path if path in self._paths else OTHER, str(status)).inc()
        if job is not None:
            self._prompt.inc(job.prompt_tokens)
            self._known.inc(job.known_tokens)
            self._generated.inc(job.generated_tokens)
            if first_s:
                self._first.observe(first_s)
            if token_s:
                self._token.observe(token_s)
