"""A worker that writes down what it pushes and what is acknowledged: `python -m paceline_chaos.witness`.

It uses the client as any user does. So that the very bytes are recorded that leave it, the one place that every push
goes through is wrapped in this process. It ends in order when its standard input does.
"""

import asyncio
import json
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import uvloop

import paceline
from paceline.connection import ShardConnection
from paceline.pushes import OutgoingPush
from paceline.worker import ReceivedUpdate
from paceline_chaos.gradients import AVERAGED, first_parameters, outer_gradient
from paceline_chaos.testimony import Acknowledged, PushKey, Sent, acknowledged_line, sent_line
from paceline_wire import codecs
from paceline_wire.errors import PacelineError, PushRefusedError

ENDED_BY_ERROR = 3
"""Exit code of a witness that was refused for good, or could not reach the run."""


class Record:
    """A witness's log.

    Args:
        path: The file; it must not exist yet.
        keep_payloads: Whether the payloads are written too, to a file beside it.
    """

    def __init__(self, path: Path, *, keep_payloads: bool) -> None:
        self._log = path.open("xb", buffering=0)
        self._payload_path = path.with_suffix(".payloads")
        self._keeping = threading.Lock()
        self._payloads = self._payload_path.open("xb", buffering=0) if keep_payloads else None

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, at once: a process that is killed then has written it."""
        self._log.write(json.dumps(line).encode() + b"\n")

    def about_to_send(self, key: PushKey, push: OutgoingPush) -> None:
        """Write down a push that has not left yet."""
        data = push.outer_gradient.payload.numpy().data
        kept = None
        if self._payloads is not None:
            with self._keeping:  # fragments are pushed side by side
                kept = (self._payload_path, self._payloads.tell(), len(data))
                self._payloads.write(data)
        codec = codecs.codec_of_wire(push.outer_gradient.announced.codec).name
        sent = Sent(base_bin=push.base_bin, codec=codec, crc32=zlib.crc32(data), payload=kept)
        self.write(sent_line(key, sent))

    def answered(self, key: PushKey, update: ReceivedUpdate) -> None:
        """Write down an acknowledgement."""
        self.write(acknowledged_line(key, Acknowledged(bins_late=update.bins_late, refusal=update.refusal)))


def record_pushes(record: Record) -> None:
    """Let every push of this process be recorded, before it leaves and when it is answered."""
    push_unrecorded = ShardConnection.push

    async def push(self: ShardConnection, push: OutgoingPush) -> ReceivedUpdate:
        worker = self.membership.worker
        key = PushKey(worker.worker_id, worker.incarnation, push.fragment, push.seq)
        await asyncio.to_thread(record.about_to_send, key, push)
        update = await push_unrecorded(self, push)
        await asyncio.to_thread(record.answered, key, update)
        return update

    ShardConnection.push = push  # type: ignore[method-assign]  # this process only records


async def exchange_until(ended: asyncio.Event, address: str, **options: Any) -> None:
    """Push round after round until told to end.

    Raises:
        PacelineError: The run cannot be reached, or refuses this worker for good.
    """
    seed, worker, start, pause_s = options["seed"], options["worker_id"], options["start"], options["pause_s"]
    async with paceline.connect(
        address, worker_id=worker, token=options["token"], tls=options["tls_ca"], reach_s=options["reach_s"]
    ) as client:
        await client.initialize(first_parameters(seed), averaged=AVERAGED)
        base = await client.fetch()
        number = 0
        while not ended.is_set():
            gradient = await asyncio.to_thread(outer_gradient, seed, worker, start, number)
            try:
                base = await client.exchange(gradient, base)
            except PushRefusedError:  # written down with its reason; the next round starts from the run's values
                base = await client.fetch()
            number += 1
            try:
                await asyncio.wait_for(ended.wait(), pause_s)
            except TimeoutError:
                continue


async def _witness(record: Record, address: str, **options: Any) -> int:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    _when_stdin_ends(lambda: loop.call_soon_threadsafe(ended.set))
    try:
        await exchange_until(ended, address, **options)
    except PacelineError as error:
        record.write({"event": "ended", "error": type(error).__name__, "reason": str(error)})
        return ENDED_BY_ERROR
    record.write({"event": "ended", "error": None, "reason": "told to"})
    return 0


def _when_stdin_ends(tell: Callable[[], Any]) -> None:
    def read_to_end() -> None:
        sys.stdin.buffer.read()
        tell()

    threading.Thread(target=read_to_end, daemon=True).start()


@click.command()
@click.option("--address", required=True)
@click.option("--worker-id", required=True)
@click.option("--start", type=int, required=True, help="Counts the processes of this worker.")
@click.option("--seed", type=int, required=True)
@click.option("--log", type=click.Path(path_type=Path), required=True)
@click.option("--pause-s", type=float, default=0.0)
@click.option("--reach-s", type=float, default=60.0)
@click.option("--keep-payloads", is_flag=True)
@click.option("--token", envvar="PACELINE_TOKEN")
@click.option("--tls-ca")
def main(log: Path, keep_payloads: bool, address: str, **options: Any) -> None:
    """Push to the run at ADDRESS and write everything down, until standard input ends."""
    torch.set_num_threads(1)
    record = Record(log, keep_payloads=keep_payloads)
    record_pushes(record)
    sys.exit(uvloop.run(_witness(record, address, **options)))


if __name__ == "__main__":
    main()
