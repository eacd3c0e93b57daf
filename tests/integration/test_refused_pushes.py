"""Pushes that are not finite: refused with a sentence, and the run goes on for everybody."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import paceline
import paceline_server
from integration.patience import wait_until
from integration.raw import RawWorker
from integration.reference import MomentumSGD, flat
from paceline_wire import codecs
from paceline_wire.errors import PushRefusedError
from paceline_wire.v1 import parameter_server_pb2 as pb

LR, BETA = 0.5, 0.6
FRAGMENT = 256
START = {"a": torch.linspace(-1, 1, FRAGMENT), "b": torch.linspace(2, 3, FRAGMENT)}


def config(**exchange: Any) -> dict[str, Any]:
    """A barrier, where one worker's fault could hold up everybody."""
    return {
        "outer": {"lr": LR, "momentum": BETA},
        "schedule": {"kind": "barrier", "lease_s": 3600},
        "exchange": {"uplink": "fp32", "downlink": "fp32", "fragment_elements": FRAGMENT, **exchange},
        "guard": {"quarantine_s": 0},
    }


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A run that starts from START; each test goes on where the one before ended."""
    tensors = [pb.Tensor(name=name, shape=[FRAGMENT], dtype=pb.DTYPE_FLOAT32, role=pb.ROLE_PARAMETER) for name in START]
    with paceline_server.local(config()) as found:
        with RawWorker(found) as raw:
            raw.initialize(pb.Manifest(tensors=tensors, fragment_elements=FRAGMENT), dict(enumerate(START.values())))
        yield found


async def test_a_fragment_that_is_not_finite_is_refused_and_the_others_count(address: str) -> None:
    """The push that is not finite is refused by name; what was whole is applied, and the barrier opens for all."""
    async with (
        paceline.connect(address, worker_id="faulty") as faulty,
        paceline.connect(address, worker_id="sound") as sound,
    ):
        base = await sound.fetch()
        references = {name: MomentumSGD(base.tensors[name], lr=LR, beta=BETA, nesterov=True) for name in START}
        first_bins = base.bins
        ones = {name: torch.ones(FRAGMENT) for name in START}
        for number, bad in enumerate((torch.nan, torch.inf, -torch.inf), start=1):
            broken = {"a": torch.ones(FRAGMENT).index_fill(0, torch.tensor([77]), bad), "b": torch.ones(FRAGMENT)}
            refused, accepted = await asyncio.gather(
                faulty.exchange(broken, base), sound.exchange(ones, base), return_exceptions=True
            )
            assert isinstance(refused, PushRefusedError)
            assert "fragment 0 cannot be applied" in str(refused)
            assert "infinite or NaN" in str(refused)
            assert isinstance(accepted, paceline.Base)
            base = accepted
            # Two workers share the learning rate; only one of them has contributed to the first fragment.
            references["a"].step(torch.full((FRAGMENT,), 0.5).double())
            references["b"].step(torch.ones(FRAGMENT).double())
            for name, reference in references.items():
                torch.testing.assert_close(base.tensors[name].double(), reference.w, rtol=1e-5, atol=1e-5)
            again = await faulty.fetch()
            assert flat(again.tensors).equal(flat(base.tensors))
            assert again.bins == base.bins == {index: first + number for index, first in first_bins.items()}
        both = await asyncio.gather(faulty.exchange(ones, base), sound.exchange(ones, base))
        for reference in references.values():
            reference.step(torch.ones(FRAGMENT).double())
        for result in both:
            for name, reference in references.items():
                torch.testing.assert_close(result.tensors[name].double(), reference.w, rtol=1e-5, atol=1e-5)
        (status,) = await sound.statuses()
        assert (status.pushes_refused, status.pushes_applied) == (3, 3 + 3 * 2 + 4)


async def test_every_codec_refuses_what_is_not_finite(address: str) -> None:
    """A lossy codec cannot smuggle in a NaN either, and the stream goes on after each refusal."""
    with RawWorker(address, "raw") as raw:
        raw.join()
        base_bin, _ = raw.fetch(0)
        with raw.exchange() as stream:
            for seq, codec in enumerate(codecs.CODEC_NAMES, start=1):
                stream.push(0, seq, base_bin, torch.full((FRAGMENT,), torch.nan), codec)
                update, values = stream.update()
                assert re.search(
                    "fragment 0 cannot be applied: .*(infinite or NaN|scale of block 0 is nan)", update.refusal
                )
                assert update.bins_late == 0
                base_bin = update.bin
            refused = raw.status().pushes_refused
            stream.push(0, seq + 1, base_bin, torch.zeros(FRAGMENT))
            update, values = stream.update()
            assert not update.HasField("refusal")
            assert torch.isfinite(values).all()
            assert raw.status().pushes_refused == refused
        raw.leave()


def test_a_refusal_reaches_only_the_start_that_pushed(address: str) -> None:
    """A worker that starts anew while its old start's refused push waits is told of its own push alone."""
    with RawWorker(address, "phoenix") as old, RawWorker(address, "phoenix") as new, RawWorker(address, "peer") as peer:
        old.join()
        peer.join()
        base_bin, _ = old.fetch(1)
        with old.exchange() as old_stream, new.exchange(opened=False) as new_stream, peer.exchange() as peer_stream:
            refused = old.status().pushes_refused
            old_stream.push(1, 1, base_bin, torch.full((FRAGMENT,), torch.nan))
            wait_until(lambda: old.status().pushes_refused == refused + 1)
            new.join()
            new_stream.open()
            applied = new.status().pushes_applied
            new_stream.push(1, 1, base_bin, torch.zeros(FRAGMENT))
            wait_until(lambda: new.status().pushes_applied == applied + 1)
            peer_stream.push(1, 1, base_bin, torch.zeros(FRAGMENT))
            update, _ = new_stream.update()
            assert not update.HasField("refusal")
            assert update.seq == 1
        new.leave()
        peer.leave()


class Line(nn.Module):
    """Three numbers that are to become one, two and three."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3))

    def loss(self) -> torch.Tensor:
        """Squared distance."""
        return (self.x - torch.tensor([1.0, 2.0, 3.0])).square().sum()


@pytest.fixture(scope="module")
def line_address() -> Iterator[str]:
    """A run of lines."""
    with paceline_server.local(config(dynamic_inner_steps=False)) as found:
        yield found


@pytest.mark.parametrize("overlap", ["eager", "delayed"])
def test_a_model_that_went_bad_is_healed_from_the_run(line_address: str, overlap: str) -> None:
    """A worker ruined by NaN gradients is refused and goes on from the run's state; the other notices nothing."""
    models = [Line(), Line()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    runs = [
        paceline.join(line_address, model, optimizer, inner_steps=2, overlap=overlap)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for step in range(60):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(model.loss())
            if model is models[0] and step in (7, 20):
                assert model.x.grad is not None
                model.x.grad[1] = torch.nan
            optimizer.step()
        assert torch.isfinite(models[1].x).all()
    for run in runs:
        run.flush()
    stats = [run.stats() for run in runs]
    for run in runs:
        run.close()
    assert torch.equal(models[0].x, models[1].x)
    assert models[0].loss().item() < 0.1
    assert stats[0].pushes_refused == 2
    assert stats[1].pushes_refused == 0
    assert stats[0].rounds == stats[1].rounds == 30
