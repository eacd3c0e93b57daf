"""Updates as differences, over real connections: what a worker holds is what its shard keeps of it, bit for bit.

Each base is worked out beside the worker, from the shard's parameters in fp32 and what the worker held before. If the
shard's reference differed from that in one bit, so would the base.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.killable import KillableServer
from integration.proxy import Proxy, Way
from paceline import Base, Client
from paceline.fragments import gather
from paceline_wire import codecs

SIZE = 3 * 1024 - 100
"""Two fragments of 1024 and one of 924, which is no multiple of a codec's block."""
FRAGMENTS = 3

NARROW_SIZE = 4 * 128 * 1024
"""Four fragments, each of half a MiB in fp32."""

BF16 = codecs.codec("bf16")


FLAGS: dict[str, Any] = {
    "outer": {"lr": 0.5, "momentum": 0.5, "late_bins": 1000},
    "schedule": {"quota": 1},
    "guard": {"refuse_outliers": False},
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run that answers at once, with differences in int8."""
    exchange = {"uplink": "fp32", "downlink": "int8", "fragment_elements": 1024, "inner_steps": 1}
    with paceline_server.local({**FLAGS, "exchange": exchange}) as found:
        yield found


@pytest.fixture(scope="module")
def narrow_address() -> Iterator[str]:
    """The same with larger fragments, and room for few updates and for few references."""
    exchange = {"uplink": "fp32", "downlink": "int8", "fragment_elements": 128 * 1024}
    with paceline_server.local({**FLAGS, "exchange": {**exchange, "buffer_mib": 1, "reference_mib": 3}}) as found:
        yield found


def gradient(seed: int, size: int = SIZE) -> dict[str, torch.Tensor]:
    """An outer gradient."""
    return {"x": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit."""
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


class Checked:
    """A worker whose bases are worked out beside it; nobody else may push between an exchange and its check.

    Attributes:
        base: Its newest base.
        whole: Updates that were sent whole, over all fragments.
        differences: Updates that were sent as differences.
    """

    def __init__(self, client: Client, base: Base, downlink: str) -> None:
        self.base = base
        self.whole = 0
        self.differences = 0
        self._client = client
        self._codec = codecs.codec(downlink)
        self._held: dict[int, torch.Tensor] = {}

    @classmethod
    async def of(cls, client: Client, downlink: str, size: int = SIZE) -> "Checked":
        """A worker at the beginning of a run."""
        await client.initialize(gradient(0, size))
        return cls(client, await client.fetch(), downlink)

    async def exchange(self, outer_gradient: dict[str, torch.Tensor]) -> None:
        """Push, and check what comes back."""
        await self.check(await self._client.exchange(outer_gradient, self.base))

    async def overlapping(self, outer_gradients: list[dict[str, torch.Tensor]]) -> None:
        """Push several at once; only what they leave behind can be checked, by the next exchange."""
        bases = await asyncio.gather(*(self._client.exchange(each, self.base) for each in outer_gradients))
        self._keep(bases[-1])

    async def check(self, base: Base) -> None:
        """Check a base that has just been received."""
        exact = await self._client.fetch("fp32")
        assert self._client.manifest is not None
        for fragment in self._client.manifest.fragments:
            values, received = gather(fragment, exact.tensors), gather(fragment, base.tensors)
            held = self._held.get(fragment.index)
            if held is not None and same_bits(codecs.difference(self._codec, values, held).moved, received):
                self.differences += 1
            else:
                assert same_bits(codecs.decode(BF16, codecs.encode(BF16, values), values.numel()), received)
                self.whole += 1
        self._keep(base)

    def _keep(self, base: Base) -> None:
        assert self._client.manifest is not None
        self.base = base
        self._held = {each.index: gather(each, base.tensors).clone() for each in self._client.manifest.fragments}


async def test_updates_are_differences_to_what_each_worker_holds(address: str) -> None:
    """Two workers in turn, each of them sent whole values once; at rest, what the codec lost comes after all."""
    async with (
        paceline.connect(address, worker_id="a") as first,
        paceline.connect(address, worker_id="b") as second,
    ):
        workers = [await Checked.of(client, "int8") for client in (first, second)]
        for number in range(14):
            await workers[number % 3 == 0].exchange(gradient(number))
        assert [worker.whole for worker in workers] == [FRAGMENTS, FRAGMENTS]
        assert [worker.differences for worker in workers] == [8 * FRAGMENTS, 4 * FRAGMENTS]
        for _ in range(30):
            await workers[0].overlapping([{"x": torch.zeros(SIZE)}])
        await workers[0].exchange({"x": torch.zeros(SIZE)})
        exact = await first.fetch("fp32")
    torch.testing.assert_close(workers[0].base.tensors["x"], exact.tensors["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("connections", [1, 3])
async def test_cut_connections_leave_both_sides_with_the_same_bits(address: str, connections: int) -> None:
    """Cut anywhere, the next update is a difference to what has arrived, or whole where one was lost."""
    with Proxy(address) as proxy:
        async with paceline.connect(proxy.address, worker_id="cut", connections=connections) as client:
            worker = await Checked.of(client, "int8")
            await worker.exchange(gradient(1))
            before = proxy.carried["down"]
            await worker.exchange(gradient(2))
            down = proxy.carried["down"] - before
            assert (worker.whole, worker.differences) == (FRAGMENTS, FRAGMENTS)
            points: list[tuple[Way, int]] = [("up", 300), ("up", 9_000), ("down", 40)]
            points += [("down", down * share // 100) for share in (10, 20, 30, 40, 50)]
            for number, (way, num_bytes) in enumerate(points, start=1):
                proxy.cut_after(num_bytes, way)
                await worker.exchange(gradient(2 * number))
                await worker.exchange(gradient(2 * number + 1))
                assert proxy.cuts == number
            assert worker.whole > FRAGMENTS
            assert worker.differences > FRAGMENTS * (1 + len(points))
            assert worker.whole + worker.differences == FRAGMENTS * (2 + 2 * len(points))


async def test_a_restarted_worker_is_sent_whole_values(address: str) -> None:
    """A new start of a worker holds nothing of what the earlier one did, and is not taken to."""
    for _ in range(2):
        async with paceline.connect(address, worker_id="restarted") as client:
            worker = await Checked.of(client, "int8")
            for number in range(3):
                await worker.exchange(gradient(number))
            assert (worker.whole, worker.differences) == (FRAGMENTS, 2 * FRAGMENTS)


async def test_a_worker_whose_bits_differ_finds_out(address: str) -> None:
    """Should a worker's arithmetic lead elsewhere, the checksum of the first difference tells: whole values come."""
    async with paceline.connect(address, worker_id="other") as client:
        worker = await Checked.of(client, "int8")
        await worker.exchange(gradient(1))
        connection = client._session.connections[0]
        connection._streams._held[1].values.mul_(1.0001)  # as other rounding would
        await worker.exchange(gradient(2))
        assert connection.reconnects == 1
        assert worker.whole > FRAGMENTS
        await worker.exchange(gradient(3))
        assert worker.differences >= FRAGMENTS


class Model(nn.Module):
    """One parameter, which a step moves towards 0."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(gradient(0)["x"])

    def forward(self) -> torch.Tensor:
        """The loss."""
        return self.x.square().sum()


def test_training_goes_on_from_what_the_shard_keeps(address: str) -> None:
    """`join` with a downlink of its own, also after `flush` has set the model to other values than the worker holds."""
    model, codec = Model(), codecs.codec("int4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    async def exact() -> torch.Tensor:
        async with paceline.connect(address) as observer:
            return (await observer.fetch("fp32")).tensors["x"]

    with paceline.join(address, model, optimizer, overlap="blocking", downlink="int4") as run:
        held = [torch.empty(0)] * FRAGMENTS
        for number in range(5):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
            values = torch.split(asyncio.run(exact()), 1024)
            if number == 0:
                held = [codecs.decode(BF16, codecs.encode(BF16, each), each.numel()) for each in values]
            else:
                held = [codecs.difference(codec, *each).moved for each in zip(values, held, strict=True)]
            assert same_bits(torch.cat(held), model.x.detach())
            if number == 2:
                run.flush()
                assert same_bits(torch.cat(values), model.x.detach())
        assert run.stats().bytes_down == BF16.encoded_bytes(SIZE) + 4 * codec.encoded_bytes(SIZE)


@pytest.mark.parametrize("connections", [1, 3])
async def test_pushes_in_flight_follow_one_another(narrow_address: str, connections: int) -> None:
    """With many answers under way at once, and room for few of them, each is a difference to the one before it."""
    async with paceline.connect(narrow_address, worker_id="overlapping", connections=connections) as client:
        worker = await Checked.of(client, "int8", NARROW_SIZE)
        await worker.exchange(gradient(1, NARROW_SIZE))
        for number in range(2, 4):
            await worker.overlapping([gradient(10 * number + each, NARROW_SIZE) for each in range(4)])
            await worker.exchange(gradient(number, NARROW_SIZE))
        assert (worker.whole, worker.differences) == (4, 8)


async def test_who_has_no_room_is_sent_whole_values(narrow_address: str) -> None:
    """Where what one worker holds leaves little of exchange.reference_mib, the other's updates are whole meanwhile."""
    async with paceline.connect(narrow_address, worker_id="b") as client:
        async with paceline.connect(narrow_address, worker_id="a") as leaving:
            first = await Checked.of(leaving, "int8", NARROW_SIZE)
            await first.exchange(gradient(1, NARROW_SIZE))
            second = await Checked.of(client, "int8", NARROW_SIZE)
            for number in range(2, 4):
                await second.exchange(gradient(number, NARROW_SIZE))
                await first.exchange(gradient(10 * number, NARROW_SIZE))
            assert (first.whole, first.differences) == (4, 2 * 4)
            # Six fragments fit, of which a has four: b has two, and the other two come whole every time.
            assert (second.whole, second.differences) == (4 + 2, 2)
        for number in range(4, 24):  # until the shard has noticed, and has sent what it keeps from then on
            before = second.whole
            await second.exchange(gradient(number, NARROW_SIZE))
            if second.whole == before:
                break
        assert second.whole == before


async def test_a_killed_shard_begins_with_whole_values_again(tmp_path: Path) -> None:
    """References are in memory only: after a SIGKILL every fragment is whole once, and then a difference again."""
    flags = ["--exchange.uplink", "fp32", "--exchange.downlink", "int4", "--exchange.fragment-elements", "1024"]
    with KillableServer(tmp_path, *flags, "--schedule.quota", "1") as server:
        async with paceline.connect(server.address, worker_id="worker") as client:
            worker = await Checked.of(client, "int4")
            for number in range(6):
                if number == 3:
                    await asyncio.to_thread(server.restart)
                await worker.exchange(gradient(number))
            assert (worker.whole, worker.differences) == (2 * FRAGMENTS, 4 * FRAGMENTS)
