"""AnswerStream and AsyncAnswerStream: an answer piece by piece. Letting go of one cancels its request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import InputError
from ..generate.answer import GenerationChunk
from ..thread_end import wait_for_this_thread_at_exit
from .request import Request, closed_error


class AnswerStream:
    """An iterator over the chunks of one request, for any thread.

    Attributes:
        request: cancel it, or take the whole answer from it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> GenerationChunk:
        try:
            chunk = self.request.next_chunk()
        except KeyboardInterrupt:
            self.request.cancel()
            raise
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self.request.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.request.cancel()


class AsyncAnswerStream:
    """An asynchronous iterator over the chunks of one request, for one event loop, which it never blocks.

    The prompt is checked and handed to the engine, in another thread, when the first chunk is asked for. Cancelling the
    task that waits for a chunk cancels the request.
    """

    def __init__(self, submit: Callable[[], Request]) -> None:
        self._submit = submit
        self._request: Request | None = None
        self._news: asyncio.Event | None = None
        self._submitting = self._closed = False
        self._process = os.getpid()

    @property
    def request(self) -> Request | None:
        """The request; None until the first chunk was asked for."""
        return self._request

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> GenerationChunk:
        request = self._request or await self._begin()
        if self._closed:
            request.cancel()
            raise StopAsyncIteration
        news = self._news
        assert news is not None
        try:
            while True:
                news.clear()
                chunk = request.next_chunk_now()
                if chunk is None:
                    raise StopAsyncIteration
                if chunk != "not yet":
                    return chunk
                await news.wait()
        except asyncio.CancelledError:
            request.cancel()
            raise

    async def aclose(self) -> None:
        """Cancels the request unless it has ended; there are no further chunks."""
        self._closed = True
        if self._request is not None:
            self._request.cancel()

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._request is not None:
            self._request.cancel()

    async def _begin(self) -> Request:
        if self._closed:
            raise StopAsyncIteration
        if self._submitting:
            raise InputError(
                "a second task waits for the first chunk; expected one task a stream; ask for another stream"
            )
        # Before anything waits, perhaps on a loop that the parent's process turns, too.
        if self._process != os.getpid():
            raise closed_error()
        loop = asyncio.get_running_loop()
        self._submitting = True
        submitting: Future[Request] = Future()
        # Not the loop's own executor, which an app's slow calls may have filled.
        threading.Thread(target=_submit, args=(self._submit, submitting), daemon=True).start()
        try:
            request = await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:
            self._closed = True
            submitting.add_done_callback(_cancel_submitted)
            raise
        finally:
            self._submitting = False
        news = asyncio.Event()
        self._request, self._news = request, news

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(news.set)

        request.listen(tell)
        return request


def _submit(submit: Callable[[], Request], submitting: Future[Request]) -> None:
    wait_for_this_thread_at_exit()
    if submitting.set_running_or_notify_cancel():
        try:
            submitting.set_result(submit())
        except BaseException as error:
            submitting.set_exception(error)


def _cancel_submitted(submitting: Future[Request]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
