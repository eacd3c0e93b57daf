"""The process that carries packets between the hosts of an emulated link; `link.py` starts it.

Its one argument is JSON: the TUN devices' descriptors, which it inherits, and the link's shape. Host 0 is the hub: it
is where all links lead. It ends when its standard input does, so it never outlives whoever started it, and then
prints what it carried.
"""

import contextlib
import ipaddress
import json
import math
import os
import select
import sys
import time
from typing import Any

from link_queue import VNET, LinkQueue, LinkShape, Packet, read_packet

LONGEST_PACKET_BYTES = 65536 + VNET.size
BATCH = 32
"""Packets read from a device before others get their turn."""
STDIN = 0


class Carrier:
    """Reads packets from devices, passes them through the queues of the links on their way, and writes them.

    A packet from one outer host to another travels up the first one's link and down the other's.
    """

    def __init__(self, devices: list[int], network: str, shape: LinkShape) -> None:
        self._devices = devices
        self._hub_address = int(ipaddress.ip_network(network).network_address) + 1
        self.up = [LinkQueue(shape, 2 * host) for host in range(len(devices))]
        self.down = [LinkQueue(shape, 2 * host + 1) for host in range(len(devices))]

    def run(self) -> None:
        """Carry packets until standard input ends."""
        watched = [*self._devices, STDIN]
        while True:
            due_s = min(queue.due_s for queue in (*self.up, *self.down))
            # select, not epoll: its timeout is not rounded to milliseconds.
            wait_s = None if due_s == math.inf else max(0.0, due_s - time.monotonic())
            readable, _, _ = select.select(watched, [], [], wait_s)
            for device in readable:
                if device == STDIN:
                    return
                self._receive(self._devices.index(device))
            self._deliver()

    def _receive(self, host: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                packet = read_packet(os.read(self._devices[host], LONGEST_PACKET_BYTES))
                now_s = time.monotonic()
                if host:
                    self.up[host].send(packet, now_s)
                elif (target := self._target(packet)) is not None:
                    self.down[target].send(packet, now_s)

    def _deliver(self) -> None:
        now_s = time.monotonic()
        for queue in self.up[1:]:
            for packet in queue.arrived(now_s):
                target = self._target(packet)
                if target == 0:
                    self._write(0, packet)
                elif target is not None:
                    self.down[target].send(packet, now_s)
        for host, queue in enumerate(self.down):
            for packet in queue.arrived(now_s):
                self._write(host, packet)

    def _write(self, host: int, packet: Packet) -> None:
        # A host that has no room for a packet loses it, as a network card would.
        with contextlib.suppress(OSError):
            os.write(self._devices[host], packet.data)

    def _target(self, packet: Packet) -> int | None:
        """The host that an IPv4 packet is for; None: none of ours (multicast, IPv6)."""
        if packet.data[VNET.size] >> 4 != 4:
            return None
        host = int.from_bytes(packet.data[VNET.size + 16 : VNET.size + 20], "big") - self._hub_address
        return host if 0 <= host < len(self._devices) else None


def main() -> None:
    """Carry packets until standard input ends, and print what was carried as one JSON object."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    for device in settings["devices"]:
        os.set_blocking(device, False)
    carrier = Carrier(settings["devices"], settings["network"], LinkShape(**settings["shape"]))
    with contextlib.suppress(KeyboardInterrupt):
        carrier.run()
    totals = {"up": _totals(carrier.up), "down": _totals(carrier.down), "cpu_s": time.process_time()}
    with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
        print(json.dumps(totals), flush=True)


def _totals(queues: list[LinkQueue]) -> dict[str, int]:
    return {
        "bytes": sum(queue.delivered_bytes for queue in queues),
        "lost_segments": sum(queue.lost_segments for queue in queues),
        "overflowed_segments": sum(queue.overflowed_segments for queue in queues),
    }


if __name__ == "__main__":
    main()
