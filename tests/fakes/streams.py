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

    mark = moment = drain

    def copy(self, target, source, after, background=False):
        target.copy_(source)
        return True

    def copy_all(self, targets, sources, after):
        return [self.copy(*pair, after) for pair in zip(targets, sources, strict=True)][-1]

    def ended(self, event):
        return True

    def seconds(self, begin, end):
        return 0.0

    def send(self, values):
        return values.clone()

    def current(self):
        return nullcontext()

    in_turn = current

    def capturing(self):
        return False


class SlowStreams:
    def __init__(self, delay_s=SLOW_S):
        self.compute, self.beside, self.behind, self.delay_s = Lane(), Lane(), Lane(), delay_s
        self.is_current, self.captures = False, False

    def pin(self, buffer):
        pass

    unpin = pin

    @contextmanager
    def current(self):
        before, self.is_current = self.is_current, True
        yield
        self.is_current = before

    in_turn = current

    def capturing(self):
        return self.captures

    def drain(self):
        for lane in (self.beside, self.behind):
            self.finish(lane.launch(lambda: None))

    def mark(self):
        return self.compute.launch(lambda: None)

    def copy(self, target, source, after, background=False):
        def kernel():
            after.wait(120)
            time.sleep(self.delay_s)
            target.copy_(source)

        return (self.behind if background else self.beside).launch(kernel)

    copy_all = InstantStreams.copy_all

    def send(self, values):
        return values.clone()

    def order(self, event):
        self.compute.launch(lambda: event.wait(120))

    def finish(self, event):
        assert event.wait(120)

    def ended(self, event):
        return event.is_set()

    def moment(self):
        moment = [None]

        def kernel():
            moment[0] = time.perf_counter()

        return moment, self.compute.launch(kernel)

    def seconds(self, begin, end):
        return end[0][0] - begin[0][0] if end[1].is_set() else None


class HostStreams(SlowStreams):
    """The compute stream is this thread: to order it is to wait."""

    def order(self, event):
        self.finish(event)
