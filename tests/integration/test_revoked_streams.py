"""What a revoked credential has open ends, of whatever service."""

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from integration.authority import make_authority, run_certs, security_of, token_of
from integration.inside import serving
from integration.patience import PATIENCE_S
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

LIST = reflection_pb2.ServerReflectionRequest(list_services="")


async def test_what_lasts_ends_with_its_credential(tmp_path: Path) -> None:
    """The revoked one's with the sentence, whether or not anything is sent on them; another's answer as before."""
    folder = tmp_path / "certs"
    make_authority(folder, "--worker", "a", "--observer", "eve")
    security = {name: security_of(folder)[name] for name in ("token_key", "revoked")}

    def streams(channel: grpc.aio.Channel, token: str) -> tuple[Any, Any, Any]:
        metadata = (("authorization", f"Bearer {token}"),)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        probe = pb_grpc.ParameterServerServiceStub(channel)
        return (
            reflection.ServerReflectionInfo(metadata=metadata, timeout=PATIENCE_S),
            probe.Probe(metadata=metadata, timeout=PATIENCE_S),
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=metadata),
        )

    async with serving({"security": security}) as address, grpc.aio.insecure_channel(address) as channel:
        revoked = streams(channel, token_of(folder, "a"))
        others = streams(channel, token_of(folder, "eve", "observer"))
        for reflection, probe, watch in (revoked, others):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await answers(reflection, probe)
        run_certs("revoke", str(folder), "a")
        for stream in revoked:
            with pytest.raises(grpc.aio.AioRpcError, match="the credential of worker 'a' was revoked") as ended:
                await asyncio.wait_for(stream.read(), PATIENCE_S)
            assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await answers(*others[:2])
        assert not others[2].done()
        for stream in others:
            stream.cancel()


async def answers(reflection: Any, probe: Any) -> None:
    """Both streams answer what they are asked."""
    await reflection.write(LIST)
    assert len((await reflection.read()).list_services_response.service) == 4
    await probe.write(pb.ProbeRequest(ping=7))
    assert (await probe.read()).ping == 7
