"""The gate that every call passes: who calls, may it, and has it any left; then the method itself.

It is an interceptor that replaces each method's handler, since only a handler's context knows the peer's certificate.
What is too large is refused before it is parsed, and calls whose credential ends while they run are ended.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from paceline_server.refusals import Context, abort, unreadable
from paceline_server.security.caller import Caller, serve_for
from paceline_server.security.credentials import Credentials
from paceline_server.security.identity import Identity
from paceline_server.security.limits import Allowance, Allowances, Waits
from paceline_wire.bulk import Bulk
from paceline_wire.errors import InvalidInputError, LimitExceededError, PacelineError, UnavailableError

_log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between looks at the files, and at the credentials of running calls."""

MAX_REQUEST_BYTES = 1024 * 1024
"""The largest request of a call with one request; it is refused before it is parsed. Streams may have larger messages,
up to what gRPC lets through."""

REFUSAL_S = 1.0
"""Seconds before a call beyond a limit is refused: refusing at once would let a flood of them run on."""

_OPEN_METHOD = "/grpc.health.v1.Health/Check"
"""Probes of orchestrators carry no token, and learn nothing but whether the shard serves. What lasts is not open."""

MAX_OPEN_REQUEST_BYTES = 4096
"""The largest request of a caller who need not say who it is."""


@dataclass(frozen=True, eq=False)
class _Running:
    """A streaming call that is being served."""

    identity: Identity
    authorization: str
    certificate: bytes | None
    task: "asyncio.Task[Any]"
    reasons: list[PacelineError]


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls in that may come in. Belongs to one event loop.

    Args:
        credentials: What callers must show.
        allowances: What each of them may take.
    """

    def __init__(self, credentials: Credentials, allowances: Allowances) -> None:
        self._credentials = credentials
        self._allowances = allowances
        self._running: set[_Running] = set()

    async def watch(self) -> None:
        """Read again the files that change, and end running calls whose credentials no longer count; never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            changed = await asyncio.to_thread(self._credentials.look)
            for running in list(self._running):
                if (error := self._ended_by(running, changed=changed)) is not None:
                    running.reasons.append(error)
                    running.task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Put the gate before the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        return _opened(handler) if method == _OPEN_METHOD else self._gated(method, handler)

    def _gated(self, method: str, handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
        kind = (handler.request_streaming, handler.response_streaming)
        make, inner = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }[kind]
        behaviour: Any = _writing(inner) if inspect.isasyncgenfunction(inner) else inner

        async def served(request: Any, context: Context) -> Any:
            return await self._serve(method, kind, behaviour, request, context)

        gated: Any = served
        deserializer = handler.request_deserializer
        if not handler.request_streaming and deserializer is not None:
            deserializer = _bounded(deserializer, MAX_REQUEST_BYTES)
        serializer = handler.response_serializer
        return make(gated, request_deserializer=deserializer, response_serializer=serializer)

    async def _serve(self, method: str, kind: tuple[bool, bool], behaviour: Any, request: Any, context: Context) -> Any:
        caller, running = await self._let_in(method, context)
        if isinstance(request, _Unusable):
            await abort(context, request.error)
        allowance = caller.allowance
        if not any(kind):
            return await behaviour(request, context)
        async with self._streaming(caller, running, context):
            if allowance is not None:
                request = _PacedMessages(request, allowance, caller.waits) if kind[0] else request
                context = _PacedContext(context, allowance, caller.waits) if kind[1] else context  # type: ignore[assignment]  # it forwards what it has not
            return await behaviour(request, context)

    @asynccontextmanager
    async def _streaming(self, caller: Caller, running: _Running, context: Context) -> AsyncIterator[None]:
        """Count a stream while it is served, and end it once its credential no longer counts."""
        with ExitStack() as open_:
            if caller.allowance is not None:
                try:
                    open_.enter_context(caller.allowance.stream())
                except LimitExceededError as error:
                    await self._refuse_slowly(context, error)
            self._running.add(running)
            open_.callback(self._running.discard, running)
            try:
                yield
            except asyncio.CancelledError:
                if not running.reasons:
                    raise
                running.task.uncancel()
                await abort(context, running.reasons[0])

    async def _let_in(self, method: str, context: Context) -> tuple[Caller, _Running]:
        """Find out who calls, whether it may, and wait for its turn; or end the call."""
        authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        certificate = next(iter((context.auth_context() or {}).get("x509_pem_cert", ())), None)
        try:
            identity = self._credentials.identify(authorization, certificate)
            allowance = self._allowances.of(identity.name)
            if allowance is not None and await allowance.call():
                # Its credential may have been revoked meanwhile, and only what runs is looked at again.
                identity = self._credentials.identify(authorization, certificate)
            identity.refuse_method(method)
        except LimitExceededError as error:
            await self._refuse_slowly(context, error)
        except PacelineError as error:
            await abort(context, error)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is served outside a task")
        caller = Caller(identity=identity, peer=str(context.peer()), allowance=allowance)
        serve_for(caller)
        return caller, _Running(identity, authorization, certificate, task, [])

    @staticmethod
    async def _refuse_slowly(context: Context, error: LimitExceededError) -> NoReturn:
        await asyncio.sleep(REFUSAL_S)
        await abort(context, error)

    def _ended_by(self, running: _Running, *, changed: bool) -> PacelineError | None:
        """Why a running call must end; None: it goes on."""
        if running.reasons:
            return None
        if self._credentials.has_expired(running.identity):
            # Worth another try: the caller may have renewed it meanwhile, and is refused for good if not.
            return UnavailableError(f"the credential of {running.identity} has expired; call again with a renewed one")
        try:
            if changed:
                self._credentials.identify(running.authorization, running.certificate)
        except PacelineError as error:
            return error
        return None


def _writing(generate: Callable[[Any, Context], AsyncIterator[Any]]) -> Callable[[Any, Context], Awaitable[None]]:
    """A method that is a generator, as reflection is, made one that writes: only that can be ended at any time."""

    async def write(request: Any, context: Context) -> None:
        async for answer in generate(request, context):
            await context.write(answer)

    return write


class _Unusable:
    """A request that was not parsed, or could not be."""

    def __init__(self, error: PacelineError) -> None:
        self.error = error


def _opened(handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
    """The handler of a method with one request and one answer that anybody may call."""
    behaviour: Any = handler.unary_unary
    deserializer: Any = handler.request_deserializer

    async def answered(request: Any, context: Context) -> Any:
        if isinstance(request, _Unusable):
            await abort(context, request.error)
        return await behaviour(request, context)

    return grpc.unary_unary_rpc_method_handler(
        answered,
        request_deserializer=_bounded(deserializer, MAX_OPEN_REQUEST_BYTES),
        response_serializer=handler.response_serializer,
    )


def _bounded(deserialize: Callable[[bytes], Any], most_bytes: int) -> Callable[[bytes], Any]:
    """A deserializer for requests of a bounded size; the others become what the gate refuses with a sentence."""

    def bounded(message: bytes) -> Any:
        if len(message) > most_bytes:
            return _Unusable(InvalidInputError(f"the request has {len(message)} bytes; at most {most_bytes} are taken"))
        try:
            return deserialize(message)
        except DecodeError as error:
            return _Unusable(unreadable(error))

    return bounded


class _PacedMessages:
    """A stream's messages, read no faster than the caller may send. Keeps none of them."""

    def __init__(self, messages: Any, allowance: Allowance, waits: Waits) -> None:
        self._messages = aiter(messages)
        self._allowance = allowance
        self._waits = waits
        self._unpaid = 0

    def __aiter__(self) -> "_PacedMessages":
        return self

    async def __anext__(self) -> Any:
        if self._unpaid:
            self._waits.received_s += await self._allowance.received(self._unpaid)
            self._unpaid = 0
        message = await anext(self._messages)
        self._unpaid = _num_bytes(message)
        return message


class _PacedContext:
    """A call's context that writes no faster than the caller may receive."""

    def __init__(self, context: Context, allowance: Allowance, waits: Waits) -> None:
        self._context = context
        self._allowance = allowance
        self._waits = waits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Send a message once there is some of the allowance left."""
        self._waits.sent_s += await self._allowance.sent(_num_bytes(message))
        await self._context.write(message)


def _num_bytes(message: Any) -> int:
    if isinstance(message, Bulk):
        return len(message.data) + int(message.head.ByteSize())
    return int(message.ByteSize()) if isinstance(message, Message) else 0
