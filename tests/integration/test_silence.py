"""Workers that fall silent are given up by their own history, however long the lease; a stopped server is fair."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import paceline_server
from integration.patience import wait_until
from integration.raw import RawWorker
from integration.test_commands import serve
from paceline_wire.v1 import parameter_server_pb2 as pb

SIZE = 256
AN_HOUR = 3600.0
"""A lease that no test waits for: only a worker's history can make the barrier go on."""

BEATING = """
import sys, time, grpc
from paceline_wire import PROTOCOL_VERSION
from paceline_wire.v1 import parameter_server_pb2 as pb, parameter_server_pb2_grpc as pb_grpc

stub = pb_grpc.ParameterServerServiceStub(grpc.insecure_channel(sys.argv[1]))
worker = pb.Worker(worker_id="doomed", incarnation=1)
stub.Join(pb.JoinRequest(protocol_version=PROTOCOL_VERSION, worker=worker))
for _ in range(20):
    stub.Heartbeat(pb.HeartbeatRequest(worker=worker))
print("regular", flush=True)
while True:
    stub.Heartbeat(pb.HeartbeatRequest(worker=worker))
    time.sleep(0.05)
"""
"""A worker whose heartbeats are as regular as can be, and which sends nothing else."""


@contextmanager
def beating_worker(address: str) -> Iterator["subprocess.Popen[str]"]:
    """A member in a process of its own, once its history counts; it is gone at the end."""
    with subprocess.Popen([sys.executable, "-c", BEATING, address], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "regular\n"
            yield process
        finally:
            process.kill()


def names(raw: RawWorker) -> set[str]:
    """The members."""
    return {member.worker_id for member in raw.status().members}


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_stops_does_not_hold_up_the_barrier_for_its_lease(stop: signal.Signals) -> None:
    """Killed or stopped, it is given up after a few heartbeats; the barrier waits for it until then."""
    config = {
        "schedule": {"kind": "barrier", "lease_s": AN_HOUR},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": SIZE},
    }
    with paceline_server.local(config) as address, RawWorker(address, "sound") as sound:
        tensor = pb.Tensor(name="x", shape=[SIZE], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER)
        sound.initialize(pb.Manifest(tensors=[tensor], fragment_elements=SIZE), {0: torch.zeros(SIZE)})
        assert sound.join().heartbeat_ms == 2000
        with beating_worker(address) as doomed, sound.exchange() as stream:
            allowed = {member.worker_id: member.allowed_silence_ms for member in sound.status().members}
            assert allowed == {"sound": AN_HOUR * 1000, "doomed": 6000}
            stream.push(0, 1, 0, torch.ones(SIZE))
            wait_until(lambda: sound.status().pushes_applied == 1)
            assert names(sound) == {"sound", "doomed"}
            doomed.send_signal(stop)
            update, _ = stream.update()
            assert (update.seq, update.bin) == (1, 1)
            assert names(sound) == {"sound"}


def test_a_server_that_was_stopped_gives_nobody_up_for_it() -> None:
    """A server that comes back after longer than anybody may be silent reads what came before it judges.

    One pause seldom comes alone: the second one begins while it still reads.
    """
    with serve("--schedule.lease-s", "15") as served, RawWorker(served.address, "regular") as raw:
        assert raw.join().heartbeat_ms == 1000
        for _ in range(20):
            raw.heartbeat()
        (member,) = raw.status().members
        assert member.allowed_silence_ms == 3000
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.05):
                raw.heartbeat()  # raises if the worker is no member any more, and then beats no more

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            for runs_s in (0.5, 0.0):
                served.process.send_signal(signal.SIGSTOP)
                time.sleep(4.0)  # the stimulus: longer than the worker may be silent
                served.process.send_signal(signal.SIGCONT)
                time.sleep(runs_s)
            for _ in range(3):
                heard = raw.heartbeat()
                assert heard.active_workers == 1
            assert names(raw) == {"regular"}
            assert beating.is_alive()
        finally:
            over.set()
            beating.join()
