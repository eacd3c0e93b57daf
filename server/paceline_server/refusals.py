"""How a call is refused: errors as gRPC statuses, and requests that are no messages of the protocol."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from paceline_wire.errors import (
    ERROR_METADATA_KEY,
    NEWEST_INCARNATION_KEY,
    InvalidInputError,
    PacelineError,
    SupersededError,
)

_Response = TypeVar("_Response")

Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: PacelineError) -> NoReturn:
    """End a call with an error: its gRPC code, its sentence, and its name for the caller's side."""
    # A traceback holds the frames that the error passed, they hold payloads, and some hold the error: only a garbage
    # collection of everything would free them.
    error.__traceback__ = None
    metadata = [(ERROR_METADATA_KEY, type(error).__name__)]
    if isinstance(error, SupersededError) and error.newest_incarnation is not None:
        metadata.append((NEWEST_INCARNATION_KEY, str(error.newest_incarnation)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), trailing_metadata=tuple(metadata))
    raise AssertionError("context.abort returned")  # it always raises; this tells the type checker


def with_status(
    method: Callable[[Any, Any, Context], Awaitable[_Response]],
) -> Callable[[Any, Any, Context], Awaitable[_Response]]:
    """Make a unary answer's PacelineErrors gRPC statuses."""

    @functools.wraps(method)
    async def translated(self: Any, request: Any, context: Context) -> _Response:
        try:
            return await method(self, readable(request), context)
        except PacelineError as error:
            await abort(context, error)
        except DecodeError as error:
            await abort(context, unreadable(error))

    return translated


def readable(request: Any) -> Any:
    """A single request, as `bulk.handlers` hands it over.

    Raises:
        DecodeError: It could not be read.
    """
    if isinstance(request, DecodeError):
        raise request
    return request


def unreadable(error: DecodeError) -> InvalidInputError:
    """What the sender of a stream is told whose message is no message; gRPC would call it an accident of the server."""
    return InvalidInputError(f"a message is truncated, or no message of the protocol: {error}")
