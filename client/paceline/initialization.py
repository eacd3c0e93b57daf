"""The upload of a run's first parameters, so that all of them come from one model whoever comes first or dies halfway.

The shard of index 0 decides whose parameters a run gets: who comes second finds another's upload there and waits until
the other shards have it, too. If they do not get it, since its uploader died, whoever has waited long enough replaces
it: first on shard 0, which lets only one of several do so, then on the others.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
import grpc.aio
import torch

from paceline.calls import REACH_S, called, describe, persistently
from paceline.channels import Access, backoff_s
from paceline.codec_threads import in_codec_thread
from paceline.fragments import gather
from paceline_wire import PROTOCOL_VERSION, bulk, codecs
from paceline_wire.bulk import Bulk
from paceline_wire.errors import ManifestMismatchError, UnavailableError
from paceline_wire.manifest import Fragment, Manifest
from paceline_wire.transfer import Outgoing, outgoing, pieces
from paceline_wire.v1 import parameter_server_pb2 as pb
from paceline_wire.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)

PATIENCE_S = REACH_S
"""Seconds for which no shard takes anything before an upload that is not on all of them counts as abandoned."""


class Initialization:
    """One caller's part in giving a run its first parameters.

    Args:
        targets: "host:port" of every shard, in order; the session's own list, which follows shards that move.
        channels: Channels to them; the session's own list, too.
        access: TLS and token.
        manifest: What the caller exchanges.
        tensors: The caller's parameters by name.
    """

    def __init__(
        self,
        targets: Sequence[str],
        channels: Sequence[grpc.aio.Channel],
        access: Access,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._targets = targets
        self._channels = channels
        self._access = access
        self._manifest = manifest
        self._tensors = tensors
        self._own = secrets.randbits(63) + 1

    async def run(self, *, begun: bool) -> int:
        """See to it that every shard has its parameters, from one upload; returns that upload's initialization_id.

        Args:
            begun: Whether the shard of index 0 is known to have some.

        Raises:
            ManifestMismatchError: The run has another model; the text names the first tensor that differs.
            UnavailableError: The shards do not have one upload's parameters, and workers have pushed to some.
        """
        if not begun and await self._upload(0) == self._own:
            await asyncio.gather(*(self._upload(shard) for shard in range(1, len(self._targets))))
        while True:
            first = await self._described(0)
            incomplete = await self._incomplete(first.initialization_id)
            if incomplete is None:
                return int(first.initialization_id)
            _log.warning(
                "another worker began to initialize the run and did not finish: %s has no parameters of its upload; "
                "this worker uploads its own to all shards, unless something was pushed",
                self._targets[incomplete],
            )
            taken = await self._upload(0, first.initialization_id)
            if taken == self._own:
                await asyncio.gather(*(self._replace(shard) for shard in range(1, len(self._targets))))
            elif taken == first.initialization_id:
                raise UnavailableError(
                    "another worker began to initialize the run and did not finish: "
                    f"{self._targets[incomplete]} has no parameters of its upload, and {self._targets[0]} has pushes "
                    "to them: if a shard lost its data directory, bring that back; else start all servers anew"
                )

    async def _incomplete(self, initialization_id: int) -> int | None:
        """The first shard that does not get an upload's parameters; None if all have them."""
        for shard in range(len(self._targets)):
            if not await self._completed(shard, initialization_id):
                return shard
        return None

    async def _described(self, shard: int) -> pb.DescribeResponse:
        return await persistently(lambda: describe(self._stub(shard), self._access, self._targets[shard]))

    def _stub(self, shard: int) -> "pb_grpc.ParameterServerServiceAsyncStub":
        return pb_grpc.ParameterServerServiceStub(self._channels[shard])

    async def _completed(self, shard: int, initialization_id: int) -> bool:
        """Wait until a shard has an upload's parameters; False if nobody seems to bring them.

        Raises:
            ManifestMismatchError: It has those of another model.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        for delay_s in backoff_s(random.Random()):  # noqa: S311  # not for secrets
            description = await self._described(shard)
            if description.HasField("manifest"):
                self._require_same(Manifest.from_wire(description.manifest))
                if description.initialization_id == initialization_id:
                    return True
            if description.initializing:
                deadline_s = time.monotonic() + PATIENCE_S
            if time.monotonic() + delay_s > deadline_s:
                return False
            await asyncio.sleep(delay_s)
        raise AssertionError("back-off never ends")

    def _require_same(self, theirs: Manifest) -> None:
        difference = theirs.difference(self._manifest)
        if difference is not None:
            raise ManifestMismatchError(f"this run has another model: {difference} (here: the run; there: yours)")

    async def _replace(self, shard: int) -> None:
        """Give a shard this caller's parameters, in place of any that it has."""
        before = await self._described(shard)
        replaces = before.initialization_id if before.HasField("initialization_id") else None
        if await self._upload(shard, replaces) != self._own:
            raise UnavailableError(
                f"{self._targets[0]} and {self._targets[shard]} have parameters of different uploads, and workers have "
                "pushed to them: if a shard lost its data directory, bring that back; else start all servers anew"
            )

    async def _upload(self, shard: int, replaces: int | None = None) -> int:
        """Send a shard its fragments, unless it answers before: then it has some, or refuses these.

        A refusal in the middle of an upload may reach gRPC as a broken stream, so that only the next attempt tells.

        Returns:
            The initialization_id whose parameters the shard has.
        """
        return await persistently(lambda: self._upload_once(shard, replaces))

    async def _upload_once(self, shard: int, replaces: int | None) -> int:
        call = bulk.method(self._channels[shard], "Initialize")(metadata=self._access.metadata)
        start = pb.InitializeStart(
            protocol_version=PROTOCOL_VERSION,
            manifest=self._manifest.to_wire(),
            initialization_id=self._own,
            replaces=replaces,
        )
        fragments = self._manifest.fragments_of_shard(shard, len(self._targets))
        try:
            async for message in _upload_messages(start, fragments, self._tensors):
                await call.write(message)
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.RpcError):
            _log.debug("%s answered before the upload was complete", self._targets[shard])
        return int((await called(call, self._targets[shard])).initialization_id)


async def _upload_messages(
    start: pb.InitializeStart, fragments: Sequence[Fragment], tensors: Mapping[str, torch.Tensor]
) -> AsyncIterator[Bulk[pb.InitializeRequest]]:
    yield Bulk(pb.InitializeRequest(start=start), b"")
    for fragment in fragments:
        values = await in_codec_thread(_first_values, fragment, tensors)
        announced: pb.InitializeFragment | None = pb.InitializeFragment(
            fragment=fragment.index, payload=values.announced
        )
        for piece in pieces(values.payload):
            yield Bulk(pb.InitializeRequest(fragment=announced), piece)
            announced = None


def _first_values(fragment: Fragment, tensors: Mapping[str, torch.Tensor]) -> Outgoing:
    codec = codecs.codec("fp32")
    return outgoing(codec, codecs.encode(codec, gather(fragment, tensors)))
