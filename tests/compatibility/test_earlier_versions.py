"""Peers and data directories of earlier versions: what they said and kept then is understood now, and the other way."""

import queue
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

import paceline
import paceline_server
from compatibility.earlier_version import NAMES, SERVICE, Call, EarlierVersion, is_report
from compatibility.old_server import LR, OldServer
from integration.killable import KillableServer
from integration.patience import PATIENCE_S
from integration.raw import RawWorker
from paceline_server.settings import config_from_mapping
from paceline_server.storage.directory import ShardDirectory
from paceline_server.storage.recovery import recover


@pytest.fixture(params=NAMES)
def version(request: pytest.FixtureRequest) -> EarlierVersion:
    """Each version that is kept."""
    return EarlierVersion(request.param)


class OldClient:
    """Says what the old client said, in its messages, and reads only what it could read."""

    def __init__(self, version: EarlierVersion, address: str) -> None:
        self._version = version
        self._channel = grpc.insecure_channel(address)

    def say(self, call: Call) -> list[Any]:
        """Make a call again, each message once as many answers have come as had then; the answers, without reports.

        All but an exchange stream are closed once everything is said.
        """
        _, answer_type = self._version.types_of(call.method)
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{SERVICE}/{call.method}")
        num_left = sum(way == "up" for way, _ in call.messages)
        answers = stream(iter(requests.get, None), timeout=PATIENCE_S)
        read = (old_eyes(answer_type.FromString(data)) for data in answers)
        without_reports = (answer for answer in read if not is_report(answer))
        found = []
        for way, data in call.messages:
            if way == "up":
                requests.put(data)
                num_left -= 1
                if not num_left and call.method != "Exchange":
                    requests.put(None)
            elif not is_report(answer_type.FromString(data)):
                found.append(next(without_reports))
        requests.put(None)
        assert list(without_reports) == []
        return found

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def old_eyes(answer: Any) -> Any:
    """An answer without the fields that the version did not have."""
    answer.DiscardUnknownFields()
    return answer


def known(version: EarlierVersion, call: Call) -> list[Any]:
    """What the old server answered, without reports."""
    _, answer_type = version.types_of(call.method)
    answers = [answer_type.FromString(data) for way, data in call.messages if way == "down"]
    return [answer for answer in answers if not is_report(answer)]


def test_an_old_client_trains_at_todays_server(version: EarlierVersion) -> None:
    """Every call of a client of then, message for message, is answered as then: the same bins and the same values."""
    with paceline_server.local(version.configuration) as address:
        client = OldClient(version, address)
        methods = set()
        for call in version.calls:
            methods.add(call.method)
            answers, before = client.say(call), known(version, call)
            if call.method == "Describe":
                for answer in (*answers, *before):
                    del answer.shards[:]
            if call.method == "Exchange":
                answers = sorted(map(comparable, answers))
                before = sorted(map(comparable, before))
            if call.method == "Join":
                answers, before = [each.worker_index for each in answers], [each.worker_index for each in before]
            assert answers == before, call.method
        client.close()
    assert methods == {"Describe", "Initialize", "Join", "Fetch", "Exchange", "Leave"}


def comparable(answer: Any) -> tuple[Any, ...]:
    """An update: what it answers, and everything that the old client makes of it."""
    update = answer.update
    refused = update.HasField("refusal")
    return update.fragment, update.seq, update.bin, update.bins_late, refused, update.quota, answer.data


async def test_todays_client_trains_at_an_old_server(version: EarlierVersion) -> None:
    """It joins, initializes, fetches, exchanges and leaves; the numbers are those of plain descent."""
    x = torch.linspace(-1, 1, 600)
    with OldServer(version) as server:
        async with paceline.connect(server.address, worker_id="new") as client:
            await client.initialize({"x": x})
            base = await client.fetch()
            assert torch.equal(base.tensors["x"], x)
            for number in (1, 2, 3):
                gradient = torch.full((600,), float(number))
                x = x - LR * gradient
                base = await client.exchange({"x": gradient}, base)
                assert torch.equal(base.tensors["x"], x)
            assert set(base.bins.values()) == {3}
        assert server.pushes == 9
        assert server.left


def test_todays_worker_trains_at_an_old_server(version: EarlierVersion) -> None:
    """An unchanged training loop joins it, and ends with the parameters that the old server has."""
    torch.manual_seed(1)
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with OldServer(version) as server:
        with paceline.join(server.address, model, optimizer, worker_id="new") as run:
            for _ in range(8):
                optimizer.zero_grad()
                model(torch.ones(4, 20)).square().mean().backward()
                optimizer.step()
            run.flush()
            assert run.round >= 3
        values = torch.cat([server.values[index] for index in sorted(server.values)])
        trained = torch.cat([model.bias.detach().reshape(-1), model.weight.detach().reshape(-1)])
        assert torch.equal(values, trained)
        assert server.pushes >= 2 * run.round


WITH_DATA = [name for name in NAMES if (EarlierVersion(name).folder / "data.tar.gz").exists()]


@pytest.fixture(params=WITH_DATA)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[EarlierVersion, Path]:
    """Each version that kept a data directory, and the directory."""
    version = EarlierVersion(request.param)
    with tarfile.open(version.folder / "data.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return version, tmp_path / "data"


def newest_values(version: EarlierVersion) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each fragment's index, bin and values as the old server said last."""
    updates = version.updates()
    for fragment in sorted({index for index, _ in updates}):
        last = updates[fragment, max(seq for index, seq in updates if index == fragment)]
        yield fragment, last.update.bin, torch.frombuffer(bytearray(last.data), dtype=torch.float32)


def test_an_old_data_directory_is_recovered(kept: tuple[EarlierVersion, Path]) -> None:
    """The journal of then leads to the values of then, bit for bit, and to the workers of then."""
    version, data_dir = kept
    recovered = recover(ShardDirectory(data_dir, 0), config_from_mapping(version.configuration))
    assert recovered.notes == []
    for index, newest_bin, expected in newest_values(version):
        hosted, values = recovered.shard.hosted(index)
        assert hosted.ledger.issuing_bin == newest_bin
        assert torch.equal(values.published(), expected)
        assert hosted.ledger.answered["old"].seq == 3


def test_todays_server_goes_on_where_the_old_one_stopped(kept: tuple[EarlierVersion, Path]) -> None:
    """It serves the directory; a worker fetches the values of then, and trains on."""
    version, data_dir = kept
    with KillableServer(data_dir, *version.flags) as server, RawWorker(server.address, "new") as worker:
        worker.join()
        with worker.exchange() as stream:
            for index, newest_bin, expected in newest_values(version):
                found_bin, found = worker.fetch(index)
                assert found_bin == newest_bin
                assert torch.equal(found, expected)
                stream.push(index, 1, found_bin, torch.zeros_like(found))
                assert not stream.update()[0].HasField("refusal")
