"""Who may call: TLS credentials of the port, and the token that every call must carry."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from paceline_server.config_security import SecurityConfig
from paceline_server.service import abort
from paceline_wire.errors import UnauthenticatedError

_OPEN_METHODS = "/grpc.health.v1.Health/"
"""Probes of orchestrators carry no token, and learn nothing but whether the shard serves."""


def server_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """TLS credentials from the configured files; None where TLS is off."""
    if security.tls_cert is None or security.tls_key is None:
        return None
    pair = (security.tls_key.read_bytes(), security.tls_cert.read_bytes())
    client_ca = security.client_ca.read_bytes() if security.client_ca is not None else None
    return grpc.ssl_server_credentials([pair], root_certificates=client_ca, require_client_auth=client_ca is not None)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that do not carry an accepted token as `authorization: Bearer TOKEN`.

    It replaces the handler of a refused call and leaves the others as they are, so streams pass untouched.

    Args:
        tokens: The accepted tokens, at least one.
    """

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._accepted = [f"Bearer {token}".encode() for token in tokens]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Pass the call on, or refuse it in the manner of its method."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_METHODS):
            return handler
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        # Every accepted token is compared, so that the time taken tells nothing about them.
        matches = [hmac.compare_digest(str(given).encode(), accepted) for accepted in self._accepted]
        return handler if any(matches) else _refusing(handler)


def _refusing(handler: "grpc.RpcMethodHandler[Any, Any]") -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        sentence = "the token is missing or wrong; give the one that this run was started with"
        await abort(context, UnauthenticatedError(sentence))

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
