"""A second shard that is fed the journal's records one by one and never restarted, and looks at each of them.

It does not believe the journal: it decides about every push again, from its own bookkeeping, and says where the journal
has something else.
"""

import zlib
from dataclasses import dataclass, field

import torch

from paceline_chaos.closed_form import TOLERANCE, ClosedForm, Coefficients, distance
from paceline_chaos.testimony import PushKey
from paceline_server.config import ServerConfig
from paceline_server.construction import build_shard, rule_of
from paceline_server.journal import (
    Configured,
    Decided,
    FragmentInitialized,
    Initialized,
    MembershipChanged,
    Record,
)
from paceline_server.shard import Shard
from paceline_wire import codecs


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A push as the journal has it.

    Attributes:
        record: The record's number.
        crc32: CRC-32 of its payload; None if nothing of it was applied.
        base_bin: The bin that it named.
    """

    record: int
    crc32: int | None
    base_bin: int


@dataclass
class Replica:
    """One shard's replica.

    Attributes:
        index: The shard's index.
        kept: The pushes in the journal.
        problems: What is wrong with the journal, in sentences.
        newest_record: The newest record that was taken.
        shard: The state; None before the first record.
    """

    index: int
    kept: dict[PushKey, Kept] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    newest_record: int = 0
    shard: Shard | None = None
    _config: ServerConfig = field(default_factory=ServerConfig)
    _forms: dict[int, ClosedForm] = field(default_factory=dict)

    def take(self, number: int, record: Record) -> None:
        """Follow one record."""
        self.newest_record = number
        if isinstance(record, Configured):
            self._configure(record)
            return
        shard = self._begun()
        if isinstance(record, Initialized):
            shard.take_manifest(record.manifest, record.initialization_id)
            self._forms.clear()
        elif isinstance(record, FragmentInitialized):
            self._take_first_values(shard, number, record)
        elif isinstance(record, MembershipChanged):
            shard.membership.restore(record.membership, record.time_s)
        elif isinstance(record, Decided):
            self._follow(shard, number, record)

    @property
    def has_closed_form(self) -> bool:
        """Whether the run is one whose state has a closed form that is known here."""
        outer, schedule, exchange = self._config.outer, self._config.schedule, self._config.exchange
        plain = outer.rule == "ormo" and outer.correction is None and outer.lr_decay == "constant"
        constant = not (outer.lr_warmup_bins or outer.momentum_warmup_bins)
        return plain and constant and schedule.quota is not None and exchange.uplink is not None

    def differences(self, recovered: Shard, newest_record: int) -> list[str]:
        """Where a recovered shard differs from this one, in sentences; bit for bit."""
        own = self._begun()
        where = f"shard {self.index}"
        if newest_record != self.newest_record:
            return [f"{where} recovered to record {newest_record}, and the journal ends with {self.newest_record}"]
        if own.fragments.keys() != recovered.fragments.keys():
            return [f"{where} recovered other fragments than the journal initialized"]
        found = []
        for index, hosted in own.fragments.items():
            other = recovered.fragments[index]
            if hosted.ledger != other.ledger:
                found.append(f"the ledger of fragment {index} was recovered as another one than the journal's")
            if hosted.values is None or other.values is None:
                if hosted.values is not other.values:
                    found.append(f"fragment {index} was recovered without the values that the journal gives it")
                continue
            if (hosted.values.open_bin, hosted.values.newest) != (other.values.open_bin, other.values.newest):
                found.append(
                    f"fragment {index} was recovered in bin {other.values.open_bin}, not {hosted.values.open_bin}"
                )
            for name, vector in hosted.values.vectors.items():
                changed = int((vector.view(torch.int32) != other.values.vectors[name].view(torch.int32)).sum())
                if changed:
                    found.append(f"{changed} elements of {name} of fragment {index} were recovered in other bits")
        return found

    def distance_from_closed_form(self) -> float | None:
        """How far w and u are from the closed form, relative; None if the run has none."""
        if not self.has_closed_form:
            return None
        furthest = 0.0
        for index, form in self._forms.items():
            values = self._begun().fragments[index].values
            if values is not None:
                furthest = max(furthest, distance(form.w, values.w), distance(form.u, values.state["u"]))
        return furthest

    def _configure(self, record: Configured) -> None:
        self._config = ServerConfig.model_validate(record.config)
        if self.shard is None:
            self.shard = build_shard(self._config, self.index)
        else:
            self.shard.take_rule(*rule_of(self._config))

    def _begun(self) -> Shard:
        if self.shard is None:
            self.problems.append(f"the journal of shard {self.index} does not begin with a configuration")
            self.shard = build_shard(self._config, self.index)
        return self.shard

    def _take_first_values(self, shard: Shard, number: int, record: FragmentInitialized) -> None:
        fragment = shard.fragments[record.fragment]
        values = codecs.decode(codecs.codec("fp32"), record.payload, fragment.plan.num_elements)
        if self.has_closed_form:
            outer = self._config.outer
            own = Coefficients(lr=outer.lr, momentum=outer.momentum, quota=self._config.schedule.quota or 1)
            trained = fragment.plan.role == "parameter"
            self._forms[record.fragment] = ClosedForm(values, own if trained else own.of_averaged)
        shard.initialize_fragment(record.fragment, values)
        fragment.record = number

    def _follow(self, shard: Shard, number: int, record: Decided) -> None:
        if record.push is not None:
            self._note_push(number, record)
            self._decide_again(shard, number, record)
        hosted, values = shard.hosted(record.fragment)
        codec = None if record.codec is None else codecs.codec(record.codec)
        self._follow_in_closed_form(shard, record)
        values.follow(record.decision, codec, record.payload)
        shard.keep(
            record.fragment, record.decision, record.ledger, record.push.worker if record.push else None, record.norm
        )
        hosted.record = number

    def _note_push(self, number: int, record: Decided) -> None:
        push = record.push
        if push is None:
            return
        key = PushKey(push.worker, push.incarnation, record.fragment, push.seq)
        if key in self.kept:
            self.problems.append(f"{key} is in the journal twice, as record {self.kept[key].record} and {number}")
        crc32 = None if record.payload is None else zlib.crc32(record.payload.numpy().data)
        self.kept[key] = Kept(record=number, crc32=crc32, base_bin=push.base_bin)

    def _decide_again(self, shard: Shard, number: int, record: Decided) -> None:
        """Compare the decision with what this replica would have decided.

        Without a set quota, and where pushes wait, it depends on who was active at that moment, which is not in order
        with the decisions in the journal.
        """
        if self._config.schedule.kind != "async" or self._config.schedule.quota is None or record.push is None:
            return
        decision, ledger = shard.decide_push(record.time_s, record.fragment, record.push)
        if (decision, ledger) != (record.decision, record.ledger):
            self.problems.append(
                f"record {number} of shard {self.index} decides otherwise about push {record.push.seq} of worker "
                f"{record.push.worker} than its ledger demands: {record.decision.reason!r}, not {decision.reason!r}"
            )

    def _follow_in_closed_form(self, shard: Shard, record: Decided) -> None:
        form, decision = self._forms.get(record.fragment), record.decision
        if form is None:
            return
        form.open_bins(decision.bins_opened_before)
        if decision.contribution is not None and record.push is not None and record.payload is not None:
            num_elements = shard.push_elements(record.fragment)
            gradient = codecs.decode(codecs.codec(record.codec or ""), record.payload, num_elements)
            form.push(gradient, record.push.base_bin)
        form.open_bins(decision.bins_opened_after)


def describe_distance(distance_now: float) -> str | None:
    """What is wrong with a distance from the closed form; None if it is float32's rounding."""
    if distance_now <= TOLERANCE:
        return None
    return f"parameters or momentum are {distance_now:.1e} away from the closed form of their pushes (relative)"
