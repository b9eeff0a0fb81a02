"""CUDA's streams and events without CUDA: what is launched happens at once, and two uses of the same memory that
nothing holds apart are an error, however lucky their timing was.

    line of time    the host (all of its threads: locks order them), and each stream
    seen            of a line, and of an event: how far of each line is certain to be over (a vector clock)
"""

from __future__ import annotations

import contextlib
import random
import threading

import torch


class Race(AssertionError):
    pass


class Line:
    """The host, or a stream."""

    def __init__(self, name):
        self.name, self.seen = name, {}

    def step(self):
        self.seen[self] = self.seen.get(self, 0) + 1

    def comes_after(self, seen):
        for line, step in seen.items():
            self.seen[line] = max(step, self.seen.get(line, 0))


class Machine:
    """`uses` are those of memory so far: (first byte, end, written, line, its step, what it was)."""

    def __init__(self, seed=0):
        self.host, self.compute, self.streams = Line("host"), Line("compute"), []
        self.uses, self.lock, self.draw = [], threading.RLock(), random.Random(seed)
        self.here = threading.local()

    @property
    def current(self):
        return getattr(self.here, "stream", self.compute)

    def launch(self, what, reads=(), writes=(), line=None):
        """Something that uses memory: of the host, or launched by it on a stream."""
        with self.lock:
            line = line or self.current
            line.comes_after(self.host.seen)
            line.step()
            for tensor, written in [*((x, False) for x in reads), *((x, True) for x in writes)]:
                self._use(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, written, line, what)

    def _use(self, begin, end, written, line, what):
        for first, last, wrote, other, step, before in self.uses:
            apart = other is line or line.seen.get(other, 0) >= step
            if first < end and begin < last and (written or wrote) and not apart:
                raise Race(f"{what} on {line.name} does not wait for {before} on {other.name}")
        self.uses = [*self.uses[-400:], (begin, end, written, line, line.seen[line], what)]

    def patch(self, monkeypatch):
        """Put this machine in the place of CUDA."""
        machine, copy = self, torch.Tensor.copy_

        class Stream(Line):
            def __init__(self, device, priority=0):
                super().__init__(f"stream {len(machine.streams)}")
                machine.streams.append(self)

            def wait_event(self, event):
                with machine.lock:
                    self.comes_after(event.seen)

            def synchronize(self):
                with machine.lock:
                    machine.host.comes_after(self.seen)

        Line.wait_event = Stream.wait_event  # the compute stream has it, too

        class Event:
            def __init__(self, enable_timing=False):
                self.seen = {}

            def record(self, stream):
                with machine.lock:
                    stream.comes_after(machine.host.seen)
                    self.seen = dict(stream.seen)

            def synchronize(self):
                with machine.lock:
                    machine.host.comes_after(self.seen)

            def query(self):
                over = machine.draw.random() < 0.5
                if over:
                    self.synchronize()
                return over

            def elapsed_time(self, end):
                return 0.0

        @contextlib.contextmanager
        def stream(one):
            before = machine.current
            machine.here.stream = one
            try:
                yield
            finally:
                machine.here.stream = before

        def copy_(target, source, non_blocking=False):
            if non_blocking:
                machine.launch("a copy", reads=[source], writes=[target])
            return copy(target, source)

        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": stream,
            "current_stream": lambda device: machine.current,
            "device": lambda device: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: False,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
