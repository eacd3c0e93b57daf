"""One worker's training, emulated: a model of twenty tensors, inner steps that last as long as they are told, a record.

An inner step adds noise to the parameters. Where it lasts a stated time, it changes one tensor and sleeps for the rest:
a GPU's host is idle as well. What is recorded of each round is when its exchange began and ended, on the clock that all
processes of a machine share, and by then the bytes on the network interface, CPU seconds and time in inner steps.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from peer_systems.setting import Setting

TENSORS = 20
NOISE = 0.01


class Training:
    """The training of one worker.

    Args:
        setting: The model's size, and how many rounds of how many inner steps.
    """

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)  # all workers begin with the same model
        size = setting.parameters // TENSORS
        sizes = [size] * (TENSORS - 1) + [setting.parameters - size * (TENSORS - 1)]
        tensors = [torch.randn(each, generator=generator) for each in sizes]
        self.model = torch.nn.ParameterList(torch.nn.Parameter(tensor) for tensor in tensors)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self._noise = torch.randn(max(sizes), generator=generator.manual_seed(1 + setting.rank)) * NOISE
        self._setting = setting
        self._steps = 0
        self._inner_s = 0.0
        self._exchanges: list[dict[str, float]] = []

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The model's tensors, detached: float32 [n] each."""
        return [parameter.detach() for parameter in self.model]

    @property
    def num_rounds(self) -> int:
        """All rounds, those that do not count included."""
        return self._setting.warm_up + self._setting.rounds

    def inner_step(self) -> None:
        """Change parameters, for as long as an inner step lasts."""
        began_s = time.monotonic()
        tensors = self.tensors
        if self._setting.step_s:
            tensors = [tensors[self._steps % TENSORS]]
        for tensor in tensors:
            tensor.add_(self._noise[: tensor.numel()])
        self._steps += 1
        time.sleep(max(0.0, began_s + self._setting.step_s - time.monotonic()))
        self._inner_s += time.monotonic() - began_s

    def inner_steps(self) -> None:
        """Make the inner steps of a round."""
        for _ in range(self._setting.inner_steps):
            self.inner_step()

    def rounds(self) -> Iterator[None]:
        """Once for every round, after its inner steps: what the loop's body does is the exchange."""
        for _ in range(self.num_rounds):
            self.inner_steps()
            with self.exchange():
                yield

    def rounds_with_hook(self) -> Iterator[None]:
        """The same for systems that hook onto the optimizer: every inner step ends with its step, the last exchanges.

        Without gradients, SGD's step changes nothing.
        """
        for _ in range(self.num_rounds):
            for _ in range(self._setting.inner_steps - 1):
                self.inner_step()
                self.optimizer.step()
            self.inner_step()
            with self.exchange():
                self.optimizer.step()
            yield

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Record that an exchange begins and ends."""
        self.exchange_begins()
        yield
        self.exchange_ends()

    def exchange_begins(self) -> None:
        """Record that an exchange begins."""
        self._exchanges.append({"began_s": time.monotonic()})

    def exchange_ends(self) -> None:
        """Record that the exchange has ended."""
        self._exchanges[-1]["ended_s"] = time.monotonic()
        received, sent = interface_bytes(self._setting.interface)
        self._exchanges[-1] |= {
            "received": received,
            "sent": sent,
            "cpu_s": time.process_time(),
            "inner_s": self._inner_s,
        }
        event = {self._setting.warm_up: "warm", self.num_rounds: "last"}.get(len(self._exchanges))
        if event is not None:
            print(json.dumps({"event": event}), flush=True)

    def report(self, **more: object) -> None:
        """Print what was recorded, and anything else that there is to tell."""
        print(json.dumps({"event": "done", "exchanges": self._exchanges, **more}), flush=True)


def interface_bytes(name: str) -> tuple[int, int]:
    """Bytes received and sent by an interface of this process's network namespace, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, counters = line.partition(":")
        if interface.strip() == name:
            fields = counters.split()
            return int(fields[0]), int(fields[8])
    raise RuntimeError(f"this process has no network interface {name}")
