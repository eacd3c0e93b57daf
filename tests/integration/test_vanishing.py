"""Workers that vanish: their leases run out, and nobody waits for them any longer."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import torch

import paceline
import paceline_server
from integration.patience import wait_until_async
from integration.proxy import Proxy
from paceline import Base, Client

SIZE = 300
ONES = {"x": torch.ones(SIZE)}
CONFIG = {
    "outer": {"lr": 1.0, "momentum": 0.0},
    "schedule": {"kind": "barrier", "lease_s": 2.0},
    "exchange": {"uplink": "fp32", "downlink": "fp32"},
}
WORKER = """
import asyncio, sys, torch, paceline

async def main():
    async with paceline.connect(sys.argv[1], worker_id="doomed") as client:
        base = await client.fetch()
        for _ in range(int(sys.argv[2])):
            base = await client.exchange({"x": torch.zeros(300)}, base)
        print("idle", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A barrier with short leases."""
    with paceline_server.local(CONFIG) as found:
        yield found


@asynccontextmanager
async def doomed_worker(address: str, exchanges: int) -> AsyncIterator["asyncio.subprocess.Process"]:
    """A member in a process of its own, which is killed at the end at the latest."""
    command = [sys.executable, "-c", WORKER, address, str(exchanges)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def members_are(client: Client, *names: str) -> bool:
    """Whether these are the active workers."""
    (status,) = await client.statuses()
    return {member.worker_id for member in status.members} == set(names)


async def test_the_others_go_on_when_a_worker_is_killed(address: str) -> None:
    """A worker that is killed between two pushes holds up the barrier for its lease and no longer."""
    async with paceline.connect(address, worker_id="a") as first, paceline.connect(address, worker_id="b") as second:
        await first.initialize({"x": torch.zeros(SIZE)})
        async with doomed_worker(address, 1) as doomed:
            await wait_until_async(lambda: members_are(first, "a", "b", "doomed"))
            start = base = await first.fetch()
            base, _ = await asyncio.gather(first.exchange(ONES, base), second.exchange(ONES, base))
            assert_moved(start, base, 2 / 3)
            assert doomed.stdout is not None
            assert await doomed.stdout.readline() == b"idle\n"
            doomed.kill()
            await doomed.wait()
            base, _ = await asyncio.gather(first.exchange(ONES, base), second.exchange(ONES, base))
            assert_moved(start, base, 2 / 3 + 2 / 3)  # the bin had begun with three workers
            assert await members_are(first, "a", "b")
            base, _ = await asyncio.gather(first.exchange(ONES, base), second.exchange(ONES, base))
            assert_moved(start, base, 2 / 3 + 2 / 3 + 1)


async def test_a_worker_whose_lease_ran_out_comes_back_by_itself(address: str) -> None:
    """Cut off for longer than its lease, a worker is not waited for; when its link is back, its push counts."""
    with Proxy(address) as proxy:
        async with (
            paceline.connect(address, worker_id="a") as first,
            paceline.connect(proxy.address, worker_id="b") as second,
        ):
            await first.initialize({"x": torch.zeros(SIZE)})
            start = base = await first.fetch()
            proxy.hold("up")
            proxy.hold("down")
            late = asyncio.create_task(second.exchange(ONES, base))
            base = await first.exchange(ONES, base)
            assert_moved(start, base, 1 / 2)
            assert await members_are(first, "a")
            assert not late.done()
            proxy.release("up")
            proxy.release("down")
            assert_moved(start, await late, 1)
            assert await members_are(first, "a", "b")


def assert_moved(start: Base, base: Base, distance: float) -> None:
    """The parameters have moved so far from a start, against the outer gradient."""
    torch.testing.assert_close(base.tensors["x"], start.tensors["x"] - distance)
