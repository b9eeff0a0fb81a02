"""Who is answered when: order, limit, who leaves, and what a server that stops tells them. No model is needed."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("starlette")

from moe_offload.apps.serving.protocol.failures import RequestError
from moe_offload.apps.serving.queue import Job, Queue


class Held:
    """Work that runs until it is let go, or its job is dropped."""

    def __init__(self) -> None:
        self.begun, self.free, self.done = threading.Event(), threading.Event(), False

    def __call__(self, job: Job) -> None:
        self.begun.set()
        while not self.free.wait(0.005) and not job.gone():
            pass
        self.done = not job.gone()


def with_queue(test, longest: int = 8):
    async def run() -> None:
        queue = Queue(longest)
        try:
            await test(queue)
        finally:
            queue.close()
            assert queue.join(120)

    asyncio.run(run())


def test_one_after_the_other_in_the_order_they_came() -> None:
    async def test(queue: Queue) -> None:
        order: list[int] = []
        held = Held()
        queue.put(Job(held, 1))
        await asyncio.to_thread(held.begun.wait)
        jobs = [Job(lambda _, i=i: order.append(i), 1) for i in range(5)]
        for job in jobs:
            queue.put(job)
        assert len(queue) == 5 and order == []
        held.free.set()
        assert [await job.events.get() for job in jobs] == [None] * 5
        assert order == [0, 1, 2, 3, 4]

    with_queue(test)


def test_more_than_may_wait_are_told_when_to_try_again() -> None:
    async def test(queue: Queue) -> None:
        held = Held()
        queue.put(Job(held, 1))
        await asyncio.to_thread(held.begun.wait)
        queue.put(Job(held, 1))
        with pytest.raises(RequestError, match="1 requests wait already") as caught:
            queue.put(Job(held, 1))
        assert caught.value.status == 429 and 1 <= caught.value.retry_s <= 60
        held.free.set()

    with_queue(test, longest=1)


def test_where_none_may_wait_one_runs() -> None:
    async def test(queue: Queue) -> None:
        for _ in range(3):
            job = Job(lambda _: None, 1)
            queue.put(job)
            assert await job.events.get() is None

    with_queue(test, longest=0)


def test_who_leaves_while_waiting_is_not_begun_and_makes_room() -> None:
    async def test(queue: Queue) -> None:
        held, never, last = Held(), Held(), Held()
        queue.put(Job(held, 1))
        await asyncio.to_thread(held.begun.wait)
        left = Job(never, 1)
        queue.put(left)
        queue.drop(left)
        assert len(queue) == 0 and left.left
        last.free.set()
        job = Job(last, 1)
        queue.put(job)
        held.free.set()
        assert await job.events.get() is None and last.done and not never.begun.is_set()

    with_queue(test)


def test_who_leaves_while_running_frees_the_model() -> None:
    async def test(queue: Queue) -> None:
        held, after = Held(), Held()
        running, waiting = Job(held, 1), Job(after, 1)
        queue.put(running)
        after.free.set()
        queue.put(waiting)
        await asyncio.to_thread(held.begun.wait)
        queue.drop(running)
        assert await waiting.events.get() is None and after.done and not held.done

    with_queue(test)


def test_what_fails_is_told_and_the_next_is_answered() -> None:
    async def test(queue: Queue) -> None:
        def fails(_: Job) -> None:
            raise ValueError("this one")

        first, second = Job(fails, 1), Job(lambda _: None, 1)
        queue.put(first)
        queue.put(second)
        assert isinstance(await first.events.get(), ValueError) and await second.events.get() is None

    with_queue(test)


def test_a_server_that_stops_tells_all_at_once_also_while_the_model_is_busy() -> None:
    async def test(queue: Queue) -> None:
        begun, free = threading.Event(), threading.Event()

        def deaf(_: Job) -> None:  # as a model that compiles: it does not ask whether anybody waits
            begun.set()
            free.wait()

        jobs = [Job(deaf, 1), Job(deaf, 1)]
        for job in jobs:
            queue.put(job)
        await asyncio.to_thread(begun.wait)
        queue.close()
        for job in jobs:
            error = await job.events.get()
            assert isinstance(error, RequestError) and error.status == 503 and "stopping" in str(error)
        with pytest.raises(RequestError) as caught:
            queue.put(Job(deaf, 1))
        assert caught.value.status == 503
        free.set()

    with_queue(test)
