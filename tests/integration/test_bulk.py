"""Peers that join messages by hand and peers that use protobuf's own stubs understand each other over a socket."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from integration.patience import PATIENCE_S
from paceline_wire import bulk
from paceline_wire.bulk import Bulk
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

PATTERN = torch.arange(300_000, dtype=torch.int32).to(torch.uint8)
PIECES = (PATTERN[:0], PATTERN[:1], PATTERN[:127], PATTERN[:128], PATTERN)


class Echo(pb_grpc.ParameterServerServiceServicer):
    """Sends each push back as an update, with protobuf's own messages."""

    async def Exchange(  # noqa: N802  # the name of the RPC
        self, request: AsyncIterator[pb.ExchangeRequest], context: Any
    ) -> AsyncIterator[pb.ExchangeResponse]:
        """Answer until the caller is done."""
        async for message in request:
            yield pb.ExchangeResponse(update=pb.Update(fragment=message.push.fragment), data=message.data)


class BulkEcho(pb_grpc.ParameterServerServiceServicer):
    """The same with messages joined by hand."""

    async def Exchange(  # type: ignore[override]  # noqa: N802  # the name of the RPC; grpc.aio takes a generator
        self, request: AsyncIterator[Bulk[pb.ExchangeRequest]], context: Any
    ) -> AsyncIterator[Bulk[pb.ExchangeResponse]]:
        """Answer until the caller is done."""
        async for head, data in request:
            yield Bulk(pb.ExchangeResponse(update=pb.Update(fragment=head.push.fragment)), data)


@pytest.mark.parametrize("server_joins", [False, True])
@pytest.mark.parametrize("client_joins", [False, True])
async def test_both_ways_of_writing_a_message_are_one_protocol(server_joins: bool, client_joins: bool) -> None:
    """Whichever side joins by hand, heads and payload bytes arrive as they were sent, in both directions."""
    server = grpc.aio.server()
    if server_joins:
        echo: Any = BulkEcho()  # type: ignore[abstract]  # one RPC is enough here
        server.add_generic_rpc_handlers((bulk.handlers(echo),))
    else:
        echo = Echo()  # type: ignore[abstract]
        pb_grpc.add_ParameterServerServiceServicer_to_server(echo, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        if client_joins:
            call: Any = bulk.method(channel, "Exchange")(timeout=PATIENCE_S)
        else:
            call = pb_grpc.ParameterServerServiceStub(channel).Exchange(timeout=PATIENCE_S)
        for fragment, piece in enumerate(PIECES):
            head = pb.ExchangeRequest(push=pb.Push(fragment=fragment))
            data = piece.numpy().data
            await call.write(Bulk(head, data) if client_joins else pb.ExchangeRequest(push=head.push, data=bytes(data)))
            answer = await call.read()
            update = answer.head.update if client_joins else answer.update
            assert fragment == update.fragment
            assert bytes(data) == bytes(answer.data)
        await call.done_writing()
    await server.stop(None)
