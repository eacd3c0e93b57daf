"""The parameter server of torch.distributed.rpc's tutorials: bfloat16 both ways over TensorPipe, outer Nesterov steps.

Between processes of one machine TensorPipe would use shared memory; here it is held to TCP, as between machines.
"""

import os
import threading

import torch
import torch.distributed.rpc as rpc
from torch.futures import Future

from peer_systems.process import ready
from peer_systems.setting import Setting
from peer_systems.training import Training

SERVER = "server"
TIMEOUT_S = 600.0


class _State:
    """The server's parameters and the round under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parameters: list[torch.nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._arrived = 0
        self._answer: Future[list[torch.Tensor]] = Future()
        self.workers = 0

    def initialize(self, tensors: list[torch.Tensor]) -> None:
        with self._lock:
            if not self._parameters:
                self._parameters = [torch.nn.Parameter(tensor.float()) for tensor in tensors]
                self._optimizer = torch.optim.SGD(self._parameters, lr=0.7, momentum=0.9, nesterov=True)

    def exchange(self, outer_gradient: list[torch.Tensor]) -> "Future[list[torch.Tensor]]":
        with self._lock:
            answer = self._answer
            for parameter, tensor in zip(self._parameters, outer_gradient, strict=True):
                if self._arrived == 0:
                    parameter.grad = tensor.float().div_(self.workers)
                else:
                    assert parameter.grad is not None
                    parameter.grad.add_(tensor, alpha=1 / self.workers)
            self._arrived += 1
            if self._arrived < self.workers:
                return answer
            assert self._optimizer is not None
            self._optimizer.step()
            self._arrived = 0
            self._answer = Future()
            newest = [parameter.detach().bfloat16() for parameter in self._parameters]
        answer.set_result(newest)
        return answer


_state = _State()


def initialize(tensors: list[torch.Tensor]) -> None:
    """On the server: begin with these parameters, unless there are some."""
    _state.initialize(tensors)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch has no types here
def exchange(outer_gradient: list[torch.Tensor]) -> "Future[list[torch.Tensor]]":
    """On the server: add an outer gradient to the round; the newest parameters once all have come."""
    return _state.exchange(outer_gradient)


def coordinate(setting: Setting) -> None:
    """Run the server until the workers have ended."""
    _state.workers = setting.workers
    ready()
    _begin(setting, SERVER, 0)
    rpc.shutdown()


@torch.no_grad()
def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker."""
    _begin(setting, f"worker{setting.rank}", 1 + setting.rank)
    rpc.rpc_sync(SERVER, initialize, (training.tensors,), timeout=TIMEOUT_S)
    starts = [tensor.clone() for tensor in training.tensors]
    for _ in training.rounds():
        pairs = zip(starts, training.tensors, strict=True)
        outer_gradient = [(start - tensor).bfloat16() for start, tensor in pairs]
        newest = rpc.rpc_sync(SERVER, exchange, (outer_gradient,), timeout=TIMEOUT_S)
        for start, tensor, values in zip(starts, training.tensors, newest, strict=True):
            start.copy_(values)
            tensor.copy_(start)
    rpc.shutdown()


def _begin(setting: Setting, name: str, rank: int) -> None:
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = setting.interface
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://{setting.coordinator}",
        rpc_timeout=TIMEOUT_S,
        _transports=["uv"],
        _channels=["basic"],
    )
    world_size = 1 + setting.workers
    rpc.init_rpc(name, rank=rank, world_size=world_size, rpc_backend_options=options)  # type: ignore[no-untyped-call]
