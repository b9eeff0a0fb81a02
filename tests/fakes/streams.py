"""Streams of a device without one: instant, slow on purpose, and slow with the host's own thread to compute on."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import contextmanager, nullcontext

SLOW_S = 0.01


class Lane(threading.Thread):
    """A stream: what is launched runs in order, some time later."""

    def __init__(self):
        super().__init__(daemon=True)
        self.work = queue.SimpleQueue()
        self.start()

    def launch(self, kernel):
        done = threading.Event()
        self.work.put((kernel, done))
        return done

    def run(self):
        while True:
            kernel, done = self.work.get()
            kernel()
            done.set()


class InstantStreams:
    """The streams of the host itself: what is launched is done."""

    def pin(self, buffer):
        pass

    unpin = order = finish = pin

    def drain(self):
        pass

    mark = drain

    def copy(self, target, source, after):
        target.copy_(source)
        return True

    def send(self, values):
        return values.clone()

    def current(self):
        return nullcontext()

    def capturing(self):
        return False


class SlowStreams:
    def __init__(self, delay_s=SLOW_S):
        self.compute, self.beside, self.delay_s = Lane(), Lane(), delay_s
        self.is_current, self.captures = False, False

    def pin(self, buffer):
        pass

    unpin = pin

    @contextmanager
    def current(self):
        before, self.is_current = self.is_current, True
        yield
        self.is_current = before

    def capturing(self):
        return self.captures

    def drain(self):
        self.finish(self.beside.launch(lambda: None))

    def mark(self):
        return self.compute.launch(lambda: None)

    def copy(self, target, source, after):
        def kernel():
            after.wait(120)
            time.sleep(self.delay_s)
            target.copy_(source)

        return self.beside.launch(kernel)

    def send(self, values):
        return values.clone()

    def order(self, event):
        self.compute.launch(lambda: event.wait(120))

    def finish(self, event):
        assert event.wait(120)


class HostStreams(SlowStreams):
    """The compute stream is this thread: to order it is to wait."""

    def order(self, event):
        self.finish(event)
