"""The gate on its own: what a call meets on its way to its method, with real credentials and without a network."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from integration.authority import make_authority, run_certs, security_of, token_of
from integration.patience import PATIENCE_S
from paceline_server.config_limits import LimitsConfig
from paceline_server.config_security import SecurityConfig
from paceline_server.security.caller import caller
from paceline_server.security.credentials import Credentials
from paceline_server.security.gate import MAX_OPEN_REQUEST_BYTES, REFUSAL_S, Gate
from paceline_server.security.limits import BURST_S, Allowances
from paceline_wire.bulk import Bulk
from paceline_wire.v1 import parameter_server_pb2 as pb
from support_virtual_time import play

TRAINING = "/paceline_wire.v1.ParameterServerService/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
Method = Callable[..., Coroutine[Any, Any, Any]]

MBIT = 8.0
"""A million bytes a second."""


class AbortedError(Exception):
    """How a call was ended."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class Context:
    """A call's context, as far as the gate uses it."""

    def __init__(self, token: str) -> None:
        self.written: list[tuple[float, Any]] = []
        self._token = token

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The token."""
        return (("authorization", f"Bearer {self._token}"),)

    def peer(self) -> str:
        """From where it calls."""
        return "ipv4:192.0.2.1:1"

    def auth_context(self) -> dict[str, list[bytes]]:
        """No certificate."""
        return {}

    async def write(self, message: Any) -> None:
        """Keep a message, and when it was written."""
        self.written.append((asyncio.get_running_loop().time(), message))

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object) -> None:
        """End the call."""
        raise AbortedError(code, details)


def details(method: str) -> grpc.HandlerCallDetails:
    """What the gate is told of a call."""
    return cast("grpc.HandlerCallDetails", SimpleNamespace(method=method))


class Guarded:
    """A gate with the credentials of a new authority."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.folder = folder
        self.credentials = Credentials(SecurityConfig.model_validate(security_of(folder)))
        self.gate = Gate(self.credentials, Allowances(LimitsConfig.model_validate(limits)))

    async def streaming(
        self, behaviour: Any, method: str = f"{TRAINING}Exchange"
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """A method with streams both ways, behind the gate."""

        async def found(_: grpc.HandlerCallDetails) -> Any:
            return grpc.stream_stream_rpc_method_handler(behaviour)

        gated = await self.gate.intercept_service(
            found, cast("grpc.HandlerCallDetails", SimpleNamespace(method=method))
        )
        return cast("Method", gated.stream_stream)  # type: ignore[union-attr]  # there is one

    def context(self, name: str, role: str = "worker") -> Any:
        """A call of an identity."""
        return Context(token_of(self.folder, name, role))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers and an observer; nobody is revoked in it."""
    folder = tmp_path_factory.mktemp("gate") / "certs"
    make_authority(folder, "--worker", "a", "--worker", "b", "--observer", "eve")
    return folder


async def messages(*sizes: int) -> AsyncIterator[Any]:
    """Messages with so many bytes of data."""
    for size in sizes:
        yield Bulk(pb.ExchangeRequest(), bytes(size))


async def wait_for_ever(request: Any, context: Any) -> None:
    """A method that ends only when it is ended."""
    await asyncio.Event().wait()


def test_messages_are_read_and_written_at_the_callers_rate(authority: Path) -> None:
    """Each way on its own, and each identity by itself: what was before a message is paid for before it is read."""
    size = 500_000
    guarded = Guarded(authority, mbit=MBIT)
    read: dict[str, list[float]] = {"a": [], "b": []}

    async def take(request: Any, context: Any) -> None:
        async for _ in request:
            read[str(caller().identity.name)].append(asyncio.get_running_loop().time())

    async def give(request: Any, context: Any) -> None:
        for _ in range(3):
            await context.write(Bulk(pb.ExchangeResponse(), bytes(size)))

    async def scenario() -> None:
        taking, giving = await guarded.streaming(take), await guarded.streaming(give)
        began_s = asyncio.get_running_loop().time()
        contexts = {name: guarded.context(name) for name in read}
        await asyncio.gather(
            *(taking(messages(*[size] * 3), guarded.context(name)) for name in read),
            *(giving(messages(), context) for context in contexts.values()),
        )
        paid = [number * size / 1e6 - BURST_S for number in (1, 2, 3)]
        for name, context in contexts.items():
            assert [at - began_s for at in read[name]] == pytest.approx([0, *paid[:2]], abs=0.01)
            assert [at - began_s for at, _ in context.written] == pytest.approx(paid, abs=0.01)

    play(scenario)


def test_a_call_that_was_revoked_while_it_waited_is_refused(authority: Path, tmp_path: Path) -> None:
    """Nobody looks at it again once its method has begun, so it must not begin."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a")
    guarded = Guarded(folder, calls_per_s=10)
    began = []

    async def begin(request: Any, context: Any) -> None:
        began.append(request)

    async def scenario() -> None:
        opening = await guarded.streaming(begin)
        for _ in range(20):
            await opening(messages(), guarded.context("a"))
        waiting = asyncio.create_task(opening(messages(), guarded.context("a")))
        await asyncio.sleep(0.01)
        run_certs("revoke", str(folder), "a")
        assert guarded.credentials.look()
        with pytest.raises(AbortedError, match="was revoked") as refused:
            await waiting
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert len(began) == 20

    play(scenario)


@pytest.mark.parametrize("method", [f"{TRAINING}Exchange", f"{TRAINING}Probe", REFLECTION])
def test_a_running_stream_ends_with_its_credential(tmp_path: Path, method: str) -> None:
    """Of whatever service; the others' go on, and one that ends by itself is forgotten."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a", "--worker", "b")
    guarded = Guarded(folder)

    async def reflect(request: Any, context: Any) -> AsyncIterator[str]:
        yield "answer"
        await asyncio.Event().wait()

    async def scenario() -> None:
        opened = await guarded.streaming(reflect if method == REFLECTION else wait_for_ever, method)
        context = guarded.context("a")
        running = asyncio.create_task(opened(messages(), context))
        others = asyncio.create_task(opened(messages(), guarded.context("b")))
        watching = asyncio.create_task(guarded.gate.watch())
        await asyncio.sleep(0)
        run_certs("revoke", str(folder), "a")
        with pytest.raises(AbortedError, match="worker 'a' was revoked") as ended:
            await running
        assert ended.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert not others.done()
        assert [message for _, message in context.written] == (["answer"] if method == REFLECTION else [])
        for task in (others, watching):
            task.cancel()
            await asyncio.wait({task})
        assert not guarded.gate._running

    play(scenario)


def test_a_stream_ends_when_its_credential_does(tmp_path: Path) -> None:
    """With an error that says to call again: the caller may have renewed it."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a")
    guarded = Guarded(folder)
    guarded.credentials._clock = lambda: now_s[0]
    now_s = [0.0]

    async def scenario() -> None:
        opened = await guarded.streaming(wait_for_ever)
        running = asyncio.create_task(opened(messages(), guarded.context("a")))
        watching = asyncio.create_task(guarded.gate.watch())
        await asyncio.sleep(0.1)
        now_s[0] = 1e12
        with pytest.raises(AbortedError, match="has expired; call again") as ended:
            await running
        assert ended.value.code is grpc.StatusCode.UNAVAILABLE
        watching.cancel()

    play(scenario)


def test_streams_are_counted_for_every_service(authority: Path) -> None:
    """One too many is refused, slowly; one that has ended makes room, and another identity has its own."""
    guarded = Guarded(authority, streams=1)

    async def reflect(request: Any, context: Any) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    async def scenario() -> None:
        reflecting = await guarded.streaming(reflect, REFLECTION)
        exchanging = await guarded.streaming(wait_for_ever)
        held = asyncio.create_task(reflecting(messages(), guarded.context("a")))
        await asyncio.sleep(0)
        others = asyncio.create_task(exchanging(messages(), guarded.context("b")))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for opened in (exchanging, reflecting):
            with pytest.raises(AbortedError, match=r"limits.streams = 1") as refused:
                await opened(messages(), guarded.context("a"))
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert loop.time() - began_s == pytest.approx(2 * REFUSAL_S)
        assert not others.done()
        held.cancel()
        await asyncio.wait({held})
        again = asyncio.create_task(exchanging(messages(), guarded.context("a")))
        await asyncio.sleep(10)
        assert not again.done()
        for task in (others, again):
            task.cancel()
            await asyncio.wait({task})

    play(scenario)


def test_roles_are_checked_before_the_method(authority: Path) -> None:
    """An observer exchanges nothing, and a method that nobody listed is for admins."""
    guarded = Guarded(authority)

    async def scenario() -> None:
        for name, role, method in (("eve", "observer", f"{TRAINING}Exchange"), ("a", "worker", "/a.New/Method")):
            opened = await guarded.streaming(wait_for_ever, method)
            with pytest.raises(AbortedError, match=f"{role} '{name}' may not call") as refused:
                await asyncio.wait_for(opened(messages(), guarded.context(name, role)), PATIENCE_S)
            assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED

    play(scenario)


async def test_only_a_small_health_check_is_open(authority: Path) -> None:
    """Without a credential nothing lasts and nothing large is taken: a stranger cannot make the shard hold memory."""
    guarded, stranger = Guarded(authority), Context("nobody's")

    async def count(request: Any, context: Any) -> str:
        return f"{len(request)} bytes"

    async def found(_: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(count, request_deserializer=bytes)

    async def gated(method: str) -> Any:
        return await guarded.gate.intercept_service(found, details(method))

    check = await gated("/grpc.health.v1.Health/Check")
    assert await check.unary_unary(check.request_deserializer(b"123"), stranger) == "3 bytes"
    with pytest.raises(AbortedError, match=f"at most {MAX_OPEN_REQUEST_BYTES} are taken"):
        await check.unary_unary(check.request_deserializer(bytes(MAX_OPEN_REQUEST_BYTES + 1)), stranger)
    watch = await gated("/grpc.health.v1.Health/Watch")
    assert await watch.unary_unary(b"123", guarded.context("a")) == "3 bytes"
    for method in ("/grpc.health.v1.Health/Watch", "/grpc.health.v1.HealthX/Check", f"{TRAINING}Describe"):
        closed = await gated(method)
        with pytest.raises(AbortedError) as refused:
            await closed.unary_unary(b"", stranger)
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
