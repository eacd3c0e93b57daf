"""The check of a run whose journal cannot be read: its parameters must be the closed form of what was acknowledged.

A push that was in flight when its worker was killed may have been applied or not; nobody was told. Each such push moves
the parameters along its own outer gradient, so a look at the difference that is left tells which were.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import paceline
from paceline.fragments import gather
from paceline_chaos.closed_form import TOLERANCE, ClosedForm, Coefficients, distance
from paceline_chaos.gradients import first_parameters
from paceline_chaos.testimony import PushKey, Sent, WitnessLogs
from paceline_wire import codecs
from paceline_wire.errors import InvalidInputError
from paceline_wire.manifest import Fragment
from paceline_wire.v1 import parameter_server_pb2 as pb

WHOLE = 0.1
"""How near to 0 or 1 the part of a push that was applied must come out, to be told from the other."""

LATE_BINS = 16
"""Lateness, in bins, up to which a push enters whole, unless outer.late_bins is set otherwise."""


@dataclass(frozen=True, kw_only=True)
class FetchedVerdict:
    """What a comparison with fetched parameters found.

    Attributes:
        acknowledged: Pushes that were acknowledged and not refused.
        in_flight: Pushes that were applied without anybody having been told.
        distance: How far the parameters are from the closed form, relative.
        lost: What is wrong, in sentences.
    """

    acknowledged: int
    in_flight: int
    distance: float
    lost: list[str]


def require_comparable(configuration: pb.RunConfiguration, *, initialized: bool) -> Coefficients:
    """The coefficients of a run that can be compared with its closed form.

    Raises:
        InvalidInputError: It cannot; the text says what chaos needs.
    """
    if initialized:
        raise InvalidInputError(
            "this run has parameters already, and chaos must know every push from the first on: give it a run of its "
            "own, on a server with an empty data directory"
        )
    outer, schedule = configuration.outer, configuration.schedule
    if outer.rule != "ormo" or schedule.kind != pb.SCHEDULE_KIND_ASYNC or not schedule.HasField("quota"):
        raise InvalidInputError(
            f"chaos compares a run with its closed form, which needs outer.rule = 'ormo', schedule.kind = 'async' and "
            f"a set schedule.quota; this server has rule {outer.rule!r}, schedule "
            f"{pb.ScheduleKind.Name(schedule.kind)} and quota {schedule.quota or 'unset'}"
        )
    return Coefficients(lr=outer.lr, momentum=outer.momentum, quota=schedule.quota)


async def compare_fetched(
    client: paceline.Client, testimony: WitnessLogs, coefficients: Coefficients, seed: int
) -> FetchedVerdict:
    """Compare a quiet run with what its witnesses pushed; they must have kept the payloads."""
    base = await client.fetch("fp32")
    manifest = client.manifest
    if manifest is None:
        raise InvalidInputError("the run has lost its parameters: it is no longer initialized")
    pushes: defaultdict[int, list[PushKey]] = defaultdict(list)
    for key in testimony.sent:
        pushes[key.fragment].append(key)
    lost, furthest, in_flight = [], 0.0, 0
    for fragment in manifest.fragments:
        check = _FragmentCheck(fragment, testimony, coefficients, first_parameters(seed), pushes[fragment.index])
        found = gather(fragment, base.tensors).double()
        # The numbers may be in the bin that answers name, or not have opened it yet.
        issuing = base.bins[fragment.index]
        away, unanswered = min(check.compare(found, max(0, issuing - back)) for back in (0, 1))
        furthest, in_flight = max(furthest, away), in_flight + unanswered
        if away > TOLERANCE:
            lost.append(
                f"fragment {fragment.index} is {away:.1e} away from the closed form of the {len(check.certain)} pushes "
                f"that were acknowledged to it, whatever became of the {len(check.open)} in flight"
            )
    applied = len(testimony.acknowledged) - len(testimony.refused)
    return FetchedVerdict(acknowledged=applied, in_flight=in_flight, distance=furthest, lost=lost)


class _FragmentCheck:
    """One fragment's pushes: those that count for certain, and those that may."""

    def __init__(
        self,
        fragment: Fragment,
        testimony: WitnessLogs,
        coefficients: Coefficients,
        initial: Mapping[str, torch.Tensor],
        pushes: list[PushKey],
    ) -> None:
        self._fragment = fragment
        self._testimony = testimony
        self._coefficients = coefficients if fragment.role == "parameter" else coefficients.of_averaged
        self._initial = gather(fragment, initial)
        self.certain = [key for key in pushes if key in testimony.acknowledged and key not in testimony.refused]
        self.open = [key for key in pushes if key not in testimony.acknowledged]

    def compare(self, found: torch.Tensor, open_bin: int) -> tuple[float, int]:
        """Distance from the closed form in a bin, and how many of the open pushes it takes for that."""
        if any(self._testimony.sent[key].base_bin > open_bin for key in self.certain):
            return float("inf"), 0
        form = ClosedForm(self._initial, self._coefficients)
        form.open_bins(open_bin)
        for key in self.certain:
            late = self._testimony.acknowledged[key].bins_late
            form.push(self._gradient(key) * min(1.0, LATE_BINS / max(late, 1)), self._testimony.sent[key].base_bin)
        if not self.open:
            return distance(form.w, found), 0
        moved = [
            self._gradient(key).double() * form.weight_in_w(self._testimony.sent[key].base_bin) for key in self.open
        ]
        directions = torch.stack(moved, dim=1)
        parts = torch.linalg.lstsq(directions, (form.w - found).unsqueeze(1)).solution.squeeze(1)
        chosen = (parts > 0.5).double()
        if bool(((parts - chosen).abs() > WHOLE).any()):
            return float("inf"), 0
        return distance(form.w - directions @ chosen, found), int(chosen.sum())

    def _gradient(self, key: PushKey) -> torch.Tensor:
        sent: Sent = self._testimony.sent[key]
        if sent.payload is None:
            raise InvalidInputError(f"the payload of {key} was not kept")
        path, offset, num_bytes = sent.payload
        with path.open("rb") as payloads:
            payloads.seek(offset)
            data = payloads.read(num_bytes)
        codec = codecs.codec(sent.codec)
        return codecs.decode(codec, codecs.payload_tensor(data), self._fragment.num_elements)
