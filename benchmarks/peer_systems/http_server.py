"""The parameter server that people write by hand: http.server, torch.save in bfloat16 both ways, outer Nesterov steps.

A round's requests wait for each other. Bodies are loaded with weights_only.
"""

import http.client
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from peer_systems.process import ready
from peer_systems.setting import Setting
from peer_systems.training import Training


class _State:
    """The server's parameters and the round under way."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._changed = threading.Condition()
        self._parameters: list[torch.nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._arrived = 0
        self._round = 0
        self._answer = b""

    def initialize(self, tensors: list[torch.Tensor]) -> None:
        with self._changed:
            if not self._parameters:
                self._parameters = [torch.nn.Parameter(tensor.float()) for tensor in tensors]
                self._optimizer = torch.optim.SGD(self._parameters, lr=0.7, momentum=0.9, nesterov=True)

    def exchange(self, outer_gradient: list[torch.Tensor]) -> bytes:
        with self._changed:
            for parameter, tensor in zip(self._parameters, outer_gradient, strict=True):
                if self._arrived == 0:
                    parameter.grad = tensor.float().div_(self._workers)
                else:
                    assert parameter.grad is not None
                    parameter.grad.add_(tensor, alpha=1 / self._workers)
            self._arrived += 1
            mine = self._round
            if self._arrived == self._workers:
                assert self._optimizer is not None
                self._optimizer.step()
                self._answer = _saved([parameter.detach() for parameter in self._parameters])
                self._arrived = 0
                self._round += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._round > mine)
            return self._answer


def coordinate(setting: Setting) -> None:
    """Run the server."""
    state = _State(setting.workers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:  # http.server's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            tensors = torch.load(io.BytesIO(body), weights_only=True)
            del body
            answer = b""
            if self.path == "/initialize":
                state.initialize(tensors)
            else:
                answer = state.exchange(tensors)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  # http.server's name
            """Say nothing of single requests."""

    server = ThreadingHTTPServer((setting.coordinator_host, setting.port), Handler)
    ready()
    server.serve_forever()


@torch.no_grad()
def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker."""
    connection = http.client.HTTPConnection(setting.coordinator_host, setting.port, timeout=600)
    connection.connect()
    _post(connection, "/initialize", training.tensors)
    starts = [tensor.clone() for tensor in training.tensors]
    for _ in training.rounds():
        outer_gradient = [start - tensor for start, tensor in zip(starts, training.tensors, strict=True)]
        answer = _post(connection, "/exchange", outer_gradient)
        newest = torch.load(io.BytesIO(answer), weights_only=True)
        for start, tensor, values in zip(starts, training.tensors, newest, strict=True):
            start.copy_(values)
            tensor.copy_(start)
    connection.close()


def _post(connection: http.client.HTTPConnection, path: str, tensors: list[torch.Tensor]) -> bytes:
    connection.request("POST", path, _saved(tensors))
    return connection.getresponse().read()


def _saved(tensors: list[torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save([tensor.bfloat16() for tensor in tensors], buffer)
    return buffer.getvalue()
