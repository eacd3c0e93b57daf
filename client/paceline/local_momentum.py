"""The momentum of a torch optimizer's inner steps, for runs whose outer rule orders it (OrLoMo).

Source: algorithms.md, OrLoMo: a worker starts every round with p = 0, makes its steps by p = beta p + lr g, and sends p
beside its outer gradient. torch's SGD keeps p / lr in its buffers.
"""

from collections.abc import Mapping

import torch

from paceline_wire.errors import InvalidInputError


class LocalMomentum:
    """The momentum buffers of an SGD optimizer.

    Args:
        optimizer: Makes the inner steps.
        parameters: The exchanged parameters by name.
        coefficient: The run's momentum coefficient.

    Raises:
        InvalidInputError: The optimizer is not SGD with that momentum.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], coefficient: float
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise InvalidInputError(
                "this run's outer rule orders the workers' momentum, so the optimizer must be torch.optim.SGD with "
                f"momentum {coefficient:g}, not {type(optimizer).__name__}"
            )
        for group in optimizer.param_groups:
            if group["momentum"] != coefficient or group["nesterov"] or group["dampening"]:
                raise InvalidInputError(
                    "this run's outer rule orders the workers' momentum, so torch.optim.SGD needs momentum "
                    f"{coefficient:g}, no nesterov and no dampening; one of its groups has momentum "
                    f"{group['momentum']:g}, nesterov {bool(group['nesterov'])} and dampening {group['dampening']:g}"
                )
        self._optimizer = optimizer
        self._parameters = parameters

    def read(self) -> dict[str, torch.Tensor]:
        """The momentum p by name, with the learning rate inside; zeros where no step has made any."""
        rates = {id(parameter): group["lr"] for group in self._optimizer.param_groups for parameter in group["params"]}
        return {
            name: torch.zeros_like(parameter).detach()
            if (buffer := self._buffer(parameter)) is None
            # float32, whatever the model's dtype: p is far smaller than the parameters that it is added to.
            else buffer.float() * rates[id(parameter)]
            for name, parameter in self._parameters.items()
        }

    def reset(self) -> None:
        """Let the next round begin without momentum."""
        for parameter in self._parameters.values():
            buffer = self._buffer(parameter)
            if buffer is not None:
                buffer.zero_()

    def _buffer(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        buffer: torch.Tensor | None = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
        return buffer
