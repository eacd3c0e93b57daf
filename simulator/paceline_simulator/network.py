"""Messages between the workers and the server in virtual time, and the order in which pushes are let in."""

from collections.abc import Callable, Sequence
from functools import partial

from paceline_simulator.arrivals import RecordedOrder
from paceline_simulator.events import EventQueue, Priority
from paceline_simulator.server import SentPush, SentUpdate, SimulatedServer
from paceline_simulator.worker import SimulatedWorker


class Network:
    """Carries pushes and updates over the workers' links; those of a process that is gone are lost.

    Args:
        events: The virtual clock.
        server: Where pushes go.
        workers: Where updates go, by number.
        order: The order in which pushes are let in, at the recorded times; None: as they arrive.
        deliver: Takes an update that has arrived at its worker.
    """

    def __init__(
        self,
        events: EventQueue,
        server: SimulatedServer,
        workers: Sequence[SimulatedWorker],
        order: RecordedOrder | None,
        deliver: Callable[[SimulatedWorker, SentUpdate], None],
    ) -> None:
        self._events = events
        self._server = server
        self._workers = workers
        self._order = order
        self._deliver = deliver
        self._held: dict[tuple[int, str, int, int], SentPush] = {}

    def send_push(self, push: SentPush) -> None:
        """Put a push on its worker's link."""
        worker = self._workers[push.worker]
        worker.result.bytes_up += push.payload.numel()
        arrives_s = worker.uplink.arrival_s(self._events.now_s, push.payload.numel())
        self._events.put(arrives_s, Priority.PUSH, partial(self._push_arrives, push))

    def send_updates(self, updates: Sequence[SentUpdate]) -> None:
        """Put answers on their workers' links."""
        for sent in updates:
            worker = self._workers[sent.worker]
            if worker.is_process(sent.answer.incarnation):
                arrives_s = worker.downlink.arrival_s(self._events.now_s, sent.update.num_bytes)
                self._events.put(arrives_s, Priority.UPDATE, partial(self._update_arrives, sent))

    def _update_arrives(self, sent: SentUpdate) -> None:
        worker = self._workers[sent.worker]
        if worker.is_process(sent.answer.incarnation):
            self._deliver(worker, sent)

    def _push_arrives(self, push: SentPush) -> None:
        request = push.request
        if not self._workers[push.worker].is_process(request.incarnation):
            return
        if self._order is None:
            self._let_in(self._events.now_s, push)
            close_s = self._server.next_close_s(push.fragment)
            if close_s is not None:
                self._events.put(max(close_s, self._events.now_s), Priority.PUSH, self._close_due)
            return
        self._held[push.fragment, request.worker, request.incarnation, request.seq] = push
        self._let_in_by_order(self._order, push.fragment)

    def _let_in(self, time_s: float, push: SentPush) -> None:
        self.send_updates(self._server.push(time_s, push))

    def _close_due(self) -> None:
        self.send_updates(self._server.close_due(self._events.now_s))

    def _let_in_by_order(self, order: RecordedOrder, fragment: int) -> None:
        """Let in the pushes whose turn it is; once the record has ended, all that are held."""
        while (turn := order.turn(fragment)) is not None:
            key, time_s = turn
            push = self._held.pop((fragment, *key), None)
            if push is None:
                return
            order.take(fragment)
            close_s = self._server.next_close_s(fragment)
            if close_s is not None and close_s <= time_s:
                self.send_updates(self._server.close_due(close_s, [fragment]))
            self._let_in(time_s, push)
        for held in [held for held in self._held if held[0] == fragment]:
            self._let_in(self._events.now_s, self._held.pop(held))
