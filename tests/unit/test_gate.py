"""The gate: what waits, lasts or comes without a credential is held to it, too."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from integration.authority import make_authority, run_certs, security_of, token_of
from integration.patience import PATIENCE_S
from paceline_server.config_limits import LimitsConfig
from paceline_server.config_security import SecurityConfig
from paceline_server.security.credentials import Credentials
from paceline_server.security.gate import MAX_OPEN_REQUEST_BYTES, Gate
from paceline_server.security.limits import Allowance, Allowances

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class AbortedError(Exception):
    """How gRPC ends a call."""


class FakeContext:
    """A call's context, with a token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The token."""
        return (("authorization", f"Bearer {self._token}"),)

    def peer(self) -> str:
        """From where it calls."""
        return "ipv4:192.0.2.1:1"

    def auth_context(self) -> dict[str, Any]:
        """No TLS."""
        return {}

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> NoReturn:
        """End the call."""
        raise AbortedError(f"{code.name}: {details}")


class Entrance:
    """A gate before methods, with the authority of its callers."""

    def __init__(self, folder: Path, limits: LimitsConfig | None = None) -> None:
        self.folder = folder
        make_authority(folder, "--worker", "a")
        given = security_of(folder)
        security = SecurityConfig(token_key=Path(given["token_key"]), revoked=Path(given["revoked"]))
        self.credentials = Credentials(security)
        self.gate = Gate(self.credentials, Allowances(limits or LimitsConfig()))

    async def handler(self, method: str, behind: "grpc.RpcMethodHandler[Any, Any]") -> Any:
        """The gated handler of a method."""

        class Details:
            pass

        details: Any = Details()
        details.method = method

        async def continuation(_: Any) -> "grpc.RpcMethodHandler[Any, Any]":
            return behind

        return await self.gate.intercept_service(continuation, details)

    def context(self) -> Any:
        """The context of a call of the worker."""
        return FakeContext(token_of(self.folder, "a"))

    def revoke(self) -> None:
        """Revoke the worker's token, and let the gate's watch have looked."""
        run_certs("revoke", str(self.folder), "a")
        assert self.credentials.look()


async def test_a_credential_that_is_revoked_while_its_call_waits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch looks at running streams only when a file has changed; one that waited for its turn was none yet."""
    entrance, served = Entrance(tmp_path / "certs"), []
    waiting, turn = asyncio.Event(), asyncio.Event()

    async def slow(_: Allowance) -> bool:
        waiting.set()
        await turn.wait()
        return True

    async def exchange(request: Any, context: Any) -> None:
        served.append(request)

    monkeypatch.setattr(Allowance, "call", slow)
    behind: Any = grpc.stream_stream_rpc_method_handler(exchange)
    gated = await entrance.handler("/paceline_wire.v1.ParameterServerService/Exchange", behind)

    async def messages() -> AsyncIterator[Any]:
        return
        yield

    call = asyncio.create_task(gated.stream_stream(messages(), entrance.context()))
    await asyncio.wait_for(waiting.wait(), PATIENCE_S)
    entrance.revoke()
    turn.set()
    with pytest.raises(AbortedError, match=r"UNAUTHENTICATED: .* was revoked"):
        await asyncio.wait_for(call, PATIENCE_S)
    assert not served


async def test_reflection_is_a_stream_as_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts among an identity's streams, and ends with its credential."""
    monkeypatch.setattr("paceline_server.security.gate.LOOK_S", 0.01)
    monkeypatch.setattr("paceline_server.security.gate.REFUSAL_S", 0.0)
    entrance = Entrance(tmp_path / "certs", LimitsConfig(streams=1))

    async def reflect(request: Any, context: Any) -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    gated = await entrance.handler(REFLECTION, grpc.stream_stream_rpc_method_handler(reflect))
    watch, begun = asyncio.create_task(entrance.gate.watch()), asyncio.Event()

    async def reads() -> None:
        async for _ in gated.stream_stream(None, entrance.context()):
            begun.set()

    reading = asyncio.create_task(reads())
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    with pytest.raises(AbortedError, match=r"limits\.streams = 1"):
        await anext(gated.stream_stream(None, entrance.context()))
    run_certs("revoke", str(entrance.folder), "a")
    with pytest.raises(AbortedError, match="was revoked"):
        await asyncio.wait_for(reading, PATIENCE_S)
    watch.cancel()


async def test_only_a_small_check_is_open(tmp_path: Path) -> None:
    """Without a credential nothing lasts, and nothing large is taken: a stranger cannot make the shard hold memory."""
    entrance = Entrance(tmp_path / "certs")

    async def check(request: Any, context: Any) -> str:
        return f"{len(request)} bytes"

    behind: Any = grpc.unary_unary_rpc_method_handler(check, request_deserializer=bytes)
    gated = await entrance.handler("/grpc.health.v1.Health/Check", behind)
    stranger: Any = FakeContext("")
    assert await gated.unary_unary(gated.request_deserializer(b"123"), stranger) == "3 bytes"
    with pytest.raises(AbortedError, match=f"at most {MAX_OPEN_REQUEST_BYTES} are taken"):
        await gated.unary_unary(gated.request_deserializer(bytes(MAX_OPEN_REQUEST_BYTES + 1)), stranger)

    async def watch(request: Any, context: Any) -> str:
        return "for ever"

    behind = grpc.unary_stream_rpc_method_handler(watch)
    gated = await entrance.handler("/grpc.health.v1.Health/Watch", behind)
    with pytest.raises(AbortedError, match="UNAUTHENTICATED"):
        await gated.unary_stream(b"", stranger)
    assert await gated.unary_stream(b"", entrance.context()) == "for ever"
