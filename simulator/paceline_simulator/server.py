"""The server of a simulation: the real shards' decisions and numbers, without what carries them out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from paceline.fragments import empty_tensors, gather, scatter
from paceline.worker import ReceivedUpdate
from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard
from paceline_server.fragment import FragmentValues
from paceline_server.ledger import Answer, Decision, Ledger, Outcome, PushRequest, next_close_s
from paceline_server.shard import Shard
from paceline_simulator.arrivals import Arrival
from paceline_simulator.downlink import Downlink
from paceline_wire.codecs.base import Codec
from paceline_wire.errors import CodecError
from paceline_wire.manifest import Manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class SentPush:
    """A push on its way.

    Attributes:
        worker: The worker's number.
        fragment: The fragment's index.
        request: What it says of itself.
        payload: The encoded numbers, uint8 [m].
        inner_step_s: The worker's speed, which travels with it.
    """

    worker: int
    fragment: int
    request: PushRequest
    payload: torch.Tensor
    inner_step_s: float


class SentUpdate(NamedTuple):
    """An answer on its way."""

    worker: int
    fragment: int
    answer: Answer
    update: ReceivedUpdate


class SimulatedServer:
    """All shards of a run.

    Args:
        config: The run's configuration.
        manifest: What it exchanges.
        first: The first parameters, by name.
        uplink: How pushes are written.
        downlink: How answers are.
        names: Workers' numbers by name.
    """

    def __init__(
        self,
        config: ServerConfig,
        manifest: Manifest,
        first: Mapping[str, torch.Tensor],
        uplink: Codec,
        downlink: Downlink,
        names: Mapping[str, int],
    ) -> None:
        self.arrivals: list[Arrival] = []
        self.pushes_applied = 0
        self._manifest = manifest
        self._uplink = uplink
        self._downlink = downlink
        self._names = names
        self._send_momentum = config.exchange.own_weight == "predicted"
        self.shards = [build_shard(config, index) for index in range(config.shards)]
        for shard in self.shards:
            shard.begin_initialization(manifest, 1)
            for index, hosted in shard.fragments.items():
                shard.initialize_fragment(index, gather(hosted.plan, first).clone())

    def shard_of(self, fragment: int) -> Shard:
        """The shard on which a fragment lives."""
        return self.shards[fragment % len(self.shards)]

    @property
    def num_active(self) -> int:
        """Active workers."""
        return len(self.shards[0].membership.active)

    def join(self, now_s: float, worker: str, incarnation: int) -> int:
        """Make a worker a member of every shard, or renew it; returns the inner steps of its next round."""
        for shard in self.shards:
            shard.membership.join(now_s, worker, incarnation)
        return self.shards[0].membership.inner_steps(worker)

    def fetch(self, worker: int) -> list[tuple[torch.Tensor, int]]:
        """Every fragment's values (float32 [n]) and bin, for a worker that has joined."""
        bases = []
        for plan in self._manifest.fragments:
            hosted, values = self.shard_of(plan.index).hosted(plan.index)
            bases.append((self._downlink.first(worker, plan.index, values), hosted.ledger.issuing_bin))
        return bases

    def leave(self, now_s: float, worker: str, incarnation: int) -> list[SentUpdate]:
        """End a membership; returns the answers of the bins that nobody waits for any longer."""
        for shard in self.shards:
            shard.membership.leave(now_s, worker, incarnation)
        return self.close_due(now_s)

    def expire(self, now_s: float, alive: Sequence[tuple[str, int]]) -> list[SentUpdate]:
        """End the memberships that ran out; those that are alive, as (worker, incarnation), are renewed first."""
        for shard in self.shards:
            for worker, incarnation in alive:
                shard.membership.join(now_s, worker, incarnation)
            shard.membership.expire(now_s)
        return self.close_due(now_s)

    def push(self, now_s: float, push: SentPush) -> list[SentUpdate]:
        """Take a push that has arrived whole; returns the answers that are due then."""
        shard, request = self.shard_of(push.fragment), push.request
        if request.worker not in shard.membership.active:
            # Its lease ran out while the push was under way; a real connection would join again and send it again.
            shard.membership.join(now_s, request.worker, request.incarnation)
        shard.membership.report_speed(request.worker, push.inner_step_s)
        try:
            self._uplink.check(push.payload, shard.push_elements(push.fragment))
        except CodecError as error:
            request = replace(request, problem=f"the outer gradient cannot be applied: {error}")
        decision, ledger = shard.decide_push(now_s, push.fragment, request)
        self._record(now_s, push.fragment, request, decision.outcome)
        return self._carry_out(push.fragment, decision, ledger, push)

    def close_due(self, now_s: float, fragments: Sequence[int] | None = None) -> list[SentUpdate]:
        """Close the bins that are due, of some fragments or of all; returns the answers."""
        answers = []
        for index in range(len(self._manifest.fragments)) if fragments is None else fragments:
            decided = self.shard_of(index).decide_close(now_s, index)
            if decided is not None:
                answers += self._carry_out(index, *decided, None)
        return answers

    def next_close_s(self, fragment: int) -> float | None:
        """When time alone may close a fragment's bin."""
        shard = self.shard_of(fragment)
        return next_close_s(shard.schedule, shard.fragments[fragment].ledger)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a worker would fetch now, by name, float32; copies."""
        return self._scattered(lambda values: values.published())

    def momentum(self) -> dict[str, torch.Tensor]:
        """The rule's momentum, by name; copies."""
        return self._scattered(lambda values: values.momentum)

    def _carry_out(self, index: int, decision: Decision, ledger: Ledger, push: SentPush | None) -> list[SentUpdate]:
        """Change the numbers, keep the decision, and answer with what follows."""
        shard = self.shard_of(index)
        hosted, values = shard.hosted(index)
        if push is None or decision.contribution is None:
            values.follow(decision)
        else:
            values.follow(decision, self._uplink, push.payload)
            self.pushes_applied += 1
        shard.keep(index, decision, ledger, push.request.worker if push is not None else None)
        with_momentum = self._send_momentum and hosted.plan.role == "parameter"
        if not decision.answers:
            return []
        lr, momentum = shard.coefficients(index)
        workers = [self._names[answer.worker] for answer in decision.answers]
        all_served = self._downlink.served(workers, index, values, with_momentum=with_momentum)
        updates = []
        for worker, answer, served in zip(workers, decision.answers, all_served, strict=True):
            update = ReceivedUpdate(
                values=served.values,
                server_momentum=served.momentum,
                bin=answer.bin,
                bins_late=answer.bins_late,
                refusal=answer.refusal,
                inner_steps=shard.membership.inner_steps(answer.worker),
                quota=shard.schedule.quota or max(1, len(shard.membership.active)),
                lr=lr,
                momentum=momentum,
                num_bytes=served.num_bytes,
            )
            updates.append(SentUpdate(worker, index, answer, update))
        return updates

    def _record(self, now_s: float, fragment: int, request: PushRequest, outcome: Outcome) -> None:
        self.arrivals.append(
            Arrival(
                time_s=now_s,
                fragment=fragment,
                worker=request.worker,
                incarnation=request.incarnation,
                seq=request.seq,
                base_bin=request.base_bin,
                outcome=outcome.value,
            )
        )

    def _scattered(self, vector: Callable[[FragmentValues], torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = empty_tensors(self._manifest)
        for plan in self._manifest.fragments:
            scatter(plan, vector(self.shard_of(plan.index).hosted(plan.index)[1]), tensors)
        return tensors
