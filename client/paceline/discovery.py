"""From the address of one shard to what the run is, and where all of its shards are. Imports no torch."""

from paceline.calls import CALL_S, REACH_S, describe, persistently
from paceline.channels import Access, split_address
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc


async def find_run(address: str, access: Access, reach_s: float = REACH_S) -> tuple[pb.DescribeResponse, list[str]]:
    """Ask a shard what the run is, and where its shards are.

    Args:
        address: "host:port" of a shard.
        access: TLS and token.
        reach_s: Seconds to go on trying while the shard cannot be reached.

    Returns:
        What it said, and "host:port" of every shard in order.

    Raises:
        UnavailableError: The shard could not be reached in that time.
        PacelineError: The shard refuses this client; the text says why.
    """
    host, _ = split_address(address)
    channel = access.channel(address)
    try:
        stub = pb_grpc.ParameterServerServiceStub(channel)
        description = await persistently(lambda: describe(stub, access, address, min(CALL_S, reach_s)), reach_s)
    finally:
        await channel.close()
    targets = [f"{shard.host or host}:{shard.port}" for shard in description.shards]
    if description.shard_index < len(targets):
        targets[description.shard_index] = address  # the way that works, through forwarded ports and relays, too
    return description, targets
