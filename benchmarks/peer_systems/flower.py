"""A Flower round: its gRPC server with FedAvgM, and one client for each worker, float32 both ways.

The framework calls the client; so a round's exchange lasts from the end of one `fit` to the next one's parameters.
"""

import os

import torch

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import flwr
from flwr.common import Context, ndarrays_to_parameters
from flwr.compat.client.app import start_client
from flwr.compat.server.app import start_server
from flwr.server import ServerConfig
from flwr.server.strategy import FedAvgM

from peer_systems.process import ready
from peer_systems.setting import Setting
from peer_systems.training import Training

MESSAGE_BYTES = 2**31 - 1
"""The largest message that gRPC takes; Flower's default, 512 MiB, would refuse 200 M parameters."""


def coordinate(setting: Setting) -> None:
    """Run the server for all rounds, and one more that shows the workers the last parameters."""
    initial = Training(setting)
    strategy = FedAvgM(
        min_fit_clients=setting.workers,
        min_available_clients=setting.workers,
        fraction_evaluate=0.0,
        server_learning_rate=0.7,
        server_momentum=0.9,
        initial_parameters=ndarrays_to_parameters([tensor.numpy() for tensor in initial.tensors]),
    )
    ready()
    start_server(
        server_address=setting.coordinator,
        config=ServerConfig(num_rounds=initial.num_rounds + 1, round_timeout=None),
        strategy=strategy,
        grpc_max_message_length=MESSAGE_BYTES,
    )


def work(setting: Setting, training: Training) -> None:
    """Make all rounds of one worker."""
    client = _Client(training)

    def client_fn(context: Context) -> flwr.client.Client:
        return client.to_client()

    start_client(
        server_address=setting.coordinator,
        client_fn=client_fn,
        grpc_max_message_length=MESSAGE_BYTES,
        insecure=True,
    )


class _Client(flwr.client.NumPyClient):  # type: ignore[misc]  # flwr is not in this environment
    def __init__(self, training: Training) -> None:
        self._training = training
        self._rounds = 0

    def fit(self, parameters: list[object], config: dict[str, object]) -> tuple[list[object], int, dict[str, object]]:
        with torch.no_grad():
            for tensor, values in zip(self._training.tensors, parameters, strict=True):
                tensor.copy_(torch.from_numpy(values))
        if self._rounds:
            self._training.exchange_ends()
        self._rounds += 1
        if self._rounds <= self._training.num_rounds:
            self._training.inner_steps()
            self._training.exchange_begins()
        return [tensor.numpy() for tensor in self._training.tensors], 1, {}
