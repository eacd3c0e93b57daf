"""A worker's restart from a saved state: its new incarnation takes over the pushes of the earlier one. Pure.

The pushes of both are then numbered as one row. What the earlier one had pushed is answered like any push that is sent
again, and nothing more of it is taken: its incarnation is superseded from the same moment. So whatever was sent, and
however often the worker is restarted from one state, each push of the row is decided once.

A worker may be restarted from a state that is older than its last start. That one's pushes are in the row, too, if it
had taken over the same state; if it had begun by itself, the row of the saved state has ended, and says so.
"""

from dataclasses import dataclass, replace

from paceline_server.ledger import Answer, Ledger, newest_incarnation_of
from paceline_wire.errors import InvalidInputError, SupersededError

INCARNATIONS_REMEMBERED = 16
"""Incarnations kept of each row: a worker that dies so often before it saves its state once begins a new row."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a fragment got with a worker's pushes.

    Attributes:
        fragment: The fragment's index.
        seq: The newest push of the row that was decided; 0: none.
        refused: Those of the latest that were refused, ascending.
        superseded: Whether the row of the earlier incarnation has ended, so that the caller begins a new one.
    """

    fragment: int
    seq: int
    refused: tuple[int, ...]
    superseded: bool


def take_over(ledger: Ledger, fragment: int, worker: str, previous: int, incarnation: int) -> tuple[Progress, Ledger]:
    """Let an incarnation go on with the pushes of a previous one; asked again, the answer is the same.

    Returns:
        How far the fragment got, and the ledger that follows: the very same if nothing changes.

    Raises:
        InvalidInputError: previous is not an earlier incarnation.
        SupersededError: A newer incarnation has come; nothing was decided.
    """
    if not 1 <= previous < incarnation:
        raise InvalidInputError(
            f"worker {worker!r} cannot go on as incarnation {incarnation} from incarnation {previous}: "
            "every start needs a higher incarnation than the one before"
        )
    newest = newest_incarnation_of(ledger, worker)
    if newest > incarnation:
        raise SupersededError(
            f"worker {worker!r} has come with a newer incarnation ({newest}); this one ({incarnation}) must stop"
        )
    row = _row(ledger, worker, newest)
    superseded = bool(row) and previous not in row
    if newest != incarnation:
        if not superseded:
            ledger = _relabeled(ledger, worker, newest, incarnation)
        row = (incarnation,) if superseded else (*(row or (previous,)), incarnation)
        ledger = replace(ledger, lineages={**ledger.lineages, worker: row[-INCARNATIONS_REMEMBERED:]})
    return _progress(ledger, fragment, worker, incarnation, superseded=superseded), ledger


def _row(ledger: Ledger, worker: str, newest: int) -> tuple[int, ...]:
    """The incarnations whose pushes are numbered with those of the newest one, that one included."""
    lineage = ledger.lineages.get(worker, ())
    if lineage and lineage[-1] == newest:
        return lineage
    return (newest,) if newest else ()


def _relabeled(ledger: Ledger, worker: str, older: int, newer: int) -> Ledger:
    """The ledger with a worker's pushes of one incarnation as those of another."""

    def relabel(answer: Answer) -> Answer:
        return replace(answer, incarnation=newer) if answer.incarnation == older else answer

    answered, waiting, refused = dict(ledger.answered), dict(ledger.waiting), dict(ledger.refused)
    if worker in answered:
        answered[worker] = relabel(answered[worker])
    for answers in (waiting, refused):
        if worker in answers:
            answers[worker] = tuple(relabel(answer) for answer in answers[worker])
    return replace(ledger, answered=answered, waiting=waiting, refused=refused)


def _progress(ledger: Ledger, fragment: int, worker: str, incarnation: int, *, superseded: bool) -> Progress:
    answered = ledger.answered.get(worker)
    decided = [*ledger.waiting.get(worker, ()), *((answered,) if answered is not None else ())]
    seqs = [answer.seq for answer in decided if answer.incarnation == incarnation]
    refused = {
        answer.seq
        for answer in (*decided, *ledger.refused.get(worker, ()))
        if answer.incarnation == incarnation and answer.refusal is not None
    }
    return Progress(
        fragment=fragment,
        seq=max(seqs, default=0),
        refused=tuple(sorted(refused)),
        superseded=superseded,
    )
