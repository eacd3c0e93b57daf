"""Links with faults: each fault happens, is counted, and does to the bytes what it says and nothing else."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from integration.patience import PATIENCE_S
from paceline_chaos.links import ActiveFault, FaultyLink, LinkFault, Way

SENT = random.Random(1).randbytes(50_000)


@asynccontextmanager
async def echo(**options: bool) -> AsyncIterator[FaultyLink]:
    """A link to a server that sends back what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with FaultyLink(f"127.0.0.1:{port}", seed=3, **options) as link:
        yield link
    server.close()


async def connected(link: FaultyLink) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection through the link."""
    host, _, port = link.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def echoed(link: FaultyLink) -> bytes:
    """What comes back of SENT."""
    reader, writer = await connected(link)
    writer.write(SENT)
    writer.write_eof()
    found = await asyncio.wait_for(reader.read(-1), PATIENCE_S)
    writer.close()
    return found


async def test_without_a_fault_nothing_changes() -> None:
    """Bytes come back as they were sent, and the end of the stream too."""
    async with echo() as link:
        assert await echoed(link) == SENT
        assert link.num_accepted == 1


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("kind", [LinkFault.SLOW, LinkFault.DELAY, LinkFault.BLACKHOLE])
async def test_what_lasts_holds_bytes_back_and_changes_none(kind: LinkFault, way: Way) -> None:
    """Nothing comes while it lasts, everything afterwards, and the bytes that were held are counted."""
    async with echo() as link:
        fault = link.begin(ActiveFault(kind=kind, way=way, bytes_per_s=1e-3, delay_s=1e6))
        coming = asyncio.create_task(echoed(link))
        await asyncio.wait_for(fault.fired.wait(), PATIENCE_S)
        assert not coming.done()
        link.end(fault)
        assert await coming == SENT
        assert 0 < fault.num_bytes <= len(SENT)


@pytest.mark.parametrize("way", Way)
async def test_a_cut_resets_both_ends(way: Way) -> None:
    """The connection ends with an error at the next bytes, and the next connection works."""
    async with echo() as link:
        reader, writer = await connected(link)
        fault = link.begin(ActiveFault(kind=LinkFault.CUT, way=way))
        writer.write(b"x")
        with pytest.raises(OSError, match="reset"):
            await asyncio.wait_for(reader.read(-1), PATIENCE_S)
        writer.close()
        assert fault.fired.is_set()
        assert fault.num_bytes == 1
        assert await echoed(link) == SENT


@pytest.mark.parametrize("way", Way)
async def test_dropped_bytes_are_missing(way: Way) -> None:
    """As many are missing as were counted, once."""
    async with echo() as link:
        fault = link.begin(ActiveFault(kind=LinkFault.DROP, way=way))
        found = await echoed(link)
        assert len(found) == len(SENT) - fault.num_bytes < len(SENT)
        assert await echoed(link) == SENT


@pytest.mark.parametrize("way", Way)
async def test_duplicated_bytes_come_twice(way: Way) -> None:
    """As many are too many as were counted, and they repeat the ones before."""
    async with echo() as link:
        fault = link.begin(ActiveFault(kind=LinkFault.DUPLICATE, way=way))
        found, size = await echoed(link), fault.num_bytes
        assert size > 0
        assert any(found == SENT[:end] + SENT[end - size :] for end in range(size, len(SENT)))


@pytest.mark.parametrize("way", Way)
async def test_reordered_bytes_are_all_there(way: Way) -> None:
    """Two pieces have changed places, and nothing else has."""
    async with echo() as link:
        fault = link.begin(ActiveFault(kind=LinkFault.REORDER, way=way))
        found = await echoed(link)
        assert found != SENT
        assert sorted(found) == sorted(SENT)
        first = next(at for at in range(len(SENT)) if found[at] != SENT[at])
        moved = slice(first, first + fault.num_bytes)
        assert sorted(found[moved]) == sorted(SENT[moved])


@pytest.mark.parametrize("way", Way)
async def test_a_corrupted_bit_is_one_bit(way: Way) -> None:
    """One bit differs, where all is payload; and where there is none, nothing happens."""
    async with echo(encrypted=True) as link:
        fault = link.begin(ActiveFault(kind=LinkFault.CORRUPT, way=way))
        found = await echoed(link)
        differences = [a ^ b for a, b in zip(found, SENT, strict=True) if a != b]
        assert [bits.bit_count() for bits in differences] == [1]
        assert fault.num_bytes == 1
    async with echo() as link:
        fault = link.begin(ActiveFault(kind=LinkFault.CORRUPT, way=way))
        assert len(await echoed(link)) == len(SENT)
        assert not fault.fired.is_set()
