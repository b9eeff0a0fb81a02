"""From a request to its answer: the body is read and understood, waits for its turn, is generated, and sent.

    event loop   body (guards.Bodies)                             pieces -> one answer, or events of a stream
    a thread           fields, prompt's token ids (protocol)     |
    the queue's thread                                 generation

A client that leaves is noticed at any moment, and its request is dropped (queue.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...config.usage import is_workload
from ...plan.weights import longest_context
from ..prompt_cache.cache import PromptCache
from .generation import Generate, Piece, Sampling, generate_answer
from .guards import Bodies
from .protocol import fields, prompts
from .protocol.answers import DONE, Choice, Form
from .protocol.failures import RequestError, error_event, error_response, log_failure, stopping_error
from .queue import Job, Queue

LEAST_BODY_BYTES, BYTES_PER_TOKEN = 1 << 20, 16  # a body that fills the context has fewer, escaped or as token ids
PARSED_AT_ONCE = 2
MOST_ANSWERS = 128
MOST_WORKLOADS = 32  # each is a file
WARM_UP_ANSWER = 3  # tokens
WARM_UP_TOKENS = (8, 1)  # of the prompts that compile a graph each: several tokens, one token (and what follows them)

Work = list[tuple[prompts.Prompt, Sampling]]


class Answering:
    """Answers the requests for one model.

    Args:
        model: an offloaded model.
        tokenizer: its tokenizer, with a chat template.
        name: what clients call the model.
        queue: where requests wait.
        context: the most tokens of a prompt and its answer, if fewer than the model's own.
        generate: what makes an answer, as `generate_answer` does.
        known: where that keeps what was read, if it does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        queue: Queue,
        context: int | None = None,
        generate: Generate = generate_answer,
        known: PromptCache | None = None,
    ):
        self._model, self._tokenizer, self._name, self._queue = model, tokenizer, name, queue
        self._generate_answer, self._known = generate, known
        bounds = [bound for bound in (context, longest_context(model)) if bound is not None]
        context = min(bounds, default=None)
        self._bounds = prompts.Bounds.of(model.config.get_text_config().vocab_size, context, tokenizer)
        self._bodies = Bodies(max(LEAST_BODY_BYTES, BYTES_PER_TOKEN * (context or 0)))
        self._parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self._workload: str | None = model.moe_offload.workload
        self._workloads: set[str] = set()  # that requests have named

    def warm_up(self) -> None:
        """Compile what requests will run, so that none waits for it."""
        asked = fields.Completion(model=self._name, temperature=0)
        sampling = fields.choose_sampling(asked, self._model.generation_config, WARM_UP_ANSWER, self._bounds.vocabulary)
        sampling.config.min_new_tokens = WARM_UP_ANSWER  # the end of the text must not come before a step of one token
        some = list(self._tokenizer("The first of many requests, and some more")["input_ids"]) or [0]
        chunk = sampling.config.prefill_chunk_size
        # A piece that goes on from another has a graph of its own where the whole call is compiled.
        if chunk is None and self._model.moe_offload.compile == "inductor":
            chunk = sampling.config.prefill_chunk_size = max(WARM_UP_TOKENS)
        longer = [] if chunk is None else [chunk + max(WARM_UP_TOKENS)]
        for tokens in (*WARM_UP_TOKENS, *longer):
            ids = (some * tokens)[: min(tokens, (self._bounds.context or tokens) - WARM_UP_ANSWER)]
            self._generate_answer(
                self._model, self._tokenizer, ids, sampling, lambda: None, lambda _: None, lambda: False
            )
        if self._known is not None:
            self._known.forget()

    async def answer(self, request: Request, kind: type[fields.Common]) -> Response:
        """The response to a request whose body is a `kind`. Nothing is raised but that the client has left."""
        try:
            async with self._bodies.read(request) as body, self._parsing:
                asked, work = await asyncio.to_thread(self._understand, body, kind)
            workload = self._workload_of(asked.model)
            job = Job(
                functools.partial(self._generate, work, asked.n or 1, workload),
                sum(len(one.ids) for one, _ in work),
                seeded=asked.seed is not None,
                workload=workload,
            )
            request.scope["moe_offload.job"] = job
            self._queue.put(job)
            return await self._respond(request, asked, job, len(work) * (asked.n or 1))
        except ClientDisconnect:
            raise
        except Exception as error:
            log_failure(error)
            return error_response(error)

    def _workload_of(self, asked: str) -> str | None:
        """What the experts that a request uses are counted for: that of the server, or with "MODEL:italian" as the
        request's model, italian. None where usage is not remembered. Raises RequestError for another model."""
        if asked == self._name:
            return self._workload
        named = asked.removeprefix(self._name + ":")
        if self._workload is None or named == asked or not is_workload(named):
            raise unknown_model(asked, self._name)
        if named not in self._workloads and len(self._workloads) >= MOST_WORKLOADS:
            raise RequestError(
                400,
                f"the model {asked!r}: usage is remembered for {MOST_WORKLOADS} names at most, and as many are in use",
                param="model",
            )
        self._workloads.add(named)
        return named

    def _understand(self, body: bytes, kind: type[fields.Common]) -> tuple[Any, Work]:
        """The fields of a request, and what is to be generated for it: one entry per prompt."""
        asked = fields.parse_fields(body, kind)
        self._workload_of(asked.model)
        if isinstance(asked, fields.Chat):
            found = [prompts.chat_prompt(asked, self._tokenizer, self._bounds)]
        else:
            found = prompts.completion_prompts(asked, self._tokenizer, self._bounds)
        if len(found) * (asked.n or 1) > MOST_ANSWERS:
            raise RequestError(400, f"n: {len(found)} prompts times n are more than {MOST_ANSWERS}", param="n")
        own = self._model.generation_config
        most = [prompts.most_tokens(asked, one, own.max_new_tokens, self._bounds.context) for one in found]
        vocabulary = self._bounds.vocabulary
        return asked, [
            (one, fields.choose_sampling(asked, own, m, vocabulary)) for one, m in zip(found, most, strict=True)
        ]

    def _generate(self, work: Work, n: int, workload: str | None, job: Job) -> None:
        """The work of `job`, on the queue's thread: each prompt `n` times, one after the other."""
        if workload is not None:
            self._model.moe_offload.count_for(workload)
        for i, (prompt, sampling) in enumerate(work):
            for k in range(n):
                if job.gone():
                    return
                tell = functools.partial(_tell, job, i * n + k)
                if prompt.text:
                    tell(Piece(prompt.text, []))
                if sampling.seed is not None and k:  # the choices differ, and are the same again next time
                    sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
                self._generate_answer(
                    self._model, self._tokenizer, prompt.ids, sampling, job.count_token, tell, job.gone
                )
                if self._known is not None and not k:
                    job.known_tokens += self._known.known_tokens

    async def _respond(self, request: Request, asked: fields.Common, job: Job, choices: int) -> Response:
        """Nothing is sent before the first piece is there: what fails until then has its own status."""
        form = Form(asked, self._name, self._tokenizer)
        watching = asyncio.create_task(self._drop_if_left(request, job))
        try:
            event = await _next(job)
            if asked.stream:
                events = self._events(form, job, event, watching)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            found = [Choice() for _ in range(choices)]
            while event is not None:
                index, piece = event
                found[index].add(piece)
                event = await _next(job)
        except asyncio.CancelledError:  # by uvicorn, when a server that stops has waited long enough
            self._queue.drop(job)
            raise stopping_error() from None
        except Exception:
            watching.cancel()
            raise
        watching.cancel()
        return JSONResponse(form.whole(found, job))

    async def _events(self, form: Form, job: Job, event: Any, watching: asyncio.Task[None]) -> AsyncIterator[str]:
        """The events of a stream, from its first piece on. One that fails tells why, and ends as all do."""
        begun: set[int] = set()
        try:
            while event is not None:
                index, piece = event
                yield ("" if index in begun else form.first(index)) + form.piece(index, piece)
                begun.add(index)
                event = await _next(job)
            watching.cancel()
            yield form.last(job)
        except ClientDisconnect:
            return
        except Exception as error:
            watching.cancel()
            log_failure(error)
            yield error_event(error) + DONE
        except BaseException:  # the task that sends was ended: the client has left
            self._queue.drop(job)
            raise

    async def _drop_if_left(self, request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.drop(job)
        job.tell(ClientDisconnect())


def unknown_model(asked: str, name: str) -> RequestError:
    return RequestError(
        404, f"the model {asked[:200]!r} is not here: this server has {name!r}", param="model", code="model_not_found"
    )


def _tell(job: Job, index: int, piece: Piece) -> None:
    job.tell((index, piece))


async def _next(job: Job) -> Any:
    event = await job.events.get()
    if isinstance(event, Exception):
        raise event
    return event
