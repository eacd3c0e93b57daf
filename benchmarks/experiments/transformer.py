"""The demo's byte transformer for many workers at once, with its backward pass written out.

At 128 tokens of width 32, autograd's bookkeeping would take as long as the arithmetic. The model is the one of
`paceline.demo.model`, with the same parameter names; the tests compare the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experiments.losses import cross_entropy_backward
from paceline.demo.model import ModelConfig

EPS = torch.finfo(torch.float32).eps
"""What `nn.RMSNorm` adds to the mean square."""

# Shapes: R rows (workers), B sequences, T positions, N = B T tokens, D width, H heads, V = 256 bytes. The gradient of
# the loss with respect to `x` is called `d_x`.


@dataclass(frozen=True)
class _Norm:
    """What the backward pass needs of a norm."""

    unit: Tensor
    """[R, N, D]: the input at root mean square 1."""
    inverse: Tensor
    """[R, N, 1]: one over the input's root mean square."""


@dataclass(frozen=True)
class _Layer:
    """What the backward pass needs of a layer."""

    attention_norm: _Norm
    attention_in: Tensor
    """[R, N, D]."""
    heads: Tensor
    """[3, R B H, T, D / H]: queries, keys and values."""
    weights: Tensor
    """[R B H, T, T]: how much each position takes from each earlier one."""
    mixed: Tensor
    """[R, N, D]: what attention took together."""
    perceptron_norm: _Norm
    perceptron_in: Tensor
    """[R, N, D]."""
    hidden: Tensor
    """[R, N, 4 D], before the GELU."""
    activated: Tensor
    """[R, N, 4 D], after it."""


class StackedTransformer:
    """Computes logits and gradients of R models, each on tokens of its own."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._scale = (config.width // config.num_heads) ** -0.5
        self._mask = torch.full((config.context, config.context), -torch.inf).triu_(1)

    def logits(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the logits of the next bytes.

        Args:
            parameters: By name, float32 [R, *shape].
            inputs: int64 [R, B, T], T the model's context.

        Returns:
            float32 [R, N, V].
        """
        return self._forward(parameters, inputs)[0]

    def gradients(self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute each row's gradient of the mean cross entropy.

        Args:
            parameters: By name, float32 [R, *shape].
            inputs: int64 [R, B, T], T the model's context.
            targets: int64 [R, B, T].

        Returns:
            The gradients by name, float32 [R, *shape]; contiguous, which is what makes the batched products fast.
        """
        rows, batch, time = inputs.shape
        logits, last_in, last_norm, layers = self._forward(parameters, inputs)
        d_logits = cross_entropy_backward(logits, targets.reshape(rows, -1))
        backward = _Backward(parameters)
        d_stream = backward.norm(backward.linear(d_logits, "embedding.weight", last_in), "norm.weight", last_norm)
        for index in reversed(range(self.config.num_layers)):
            d_stream = self._layer_backward(d_stream, f"blocks.{index}.", layers[index], backward)
        backward.gradients["position"] = d_stream.view(rows, batch, time, -1).sum(1)
        which = torch.arange(rows)[:, None], inputs.reshape(rows, -1)
        backward.gradients["embedding.weight"].index_put_(which, d_stream, accumulate=True)
        return backward.gradients

    def _forward(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, _Norm, list[_Layer]]:
        rows, batch, time = inputs.shape
        embedding = parameters["embedding.weight"]
        embedded = embedding[torch.arange(rows)[:, None, None], inputs]
        stream = embedded.add_(parameters["position"][:, None]).view(rows, batch * time, -1)
        layers = []
        for index in range(self.config.num_layers):
            stream, layer = self._layer(stream, f"blocks.{index}.", parameters)
            layers.append(layer)
        last_in, last_norm = _norm(stream, parameters["norm.weight"])
        return _linear(last_in, embedding), last_in, last_norm, layers

    def _layer(self, stream: Tensor, prefix: str, parameters: Mapping[str, Tensor]) -> tuple[Tensor, _Layer]:
        attention_in, attention_norm = _norm(stream, parameters[f"{prefix}attention_norm.weight"])
        heads = self._split(_linear(attention_in, parameters[f"{prefix}query_key_value.weight"]), 3)
        query, key, value = heads
        scores = torch.baddbmm(self._mask, query, key.transpose(1, 2), alpha=self._scale)
        weights = torch.softmax(scores, -1)
        mixed = self._merge(torch.bmm(weights, value)[None], len(stream))
        stream = stream + _linear(mixed, parameters[f"{prefix}attention_out.weight"])
        perceptron_in, perceptron_norm = _norm(stream, parameters[f"{prefix}perceptron_norm.weight"])
        hidden = _linear(perceptron_in, parameters[f"{prefix}perceptron_in.weight"])
        activated = functional.gelu(hidden)
        layer = _Layer(
            attention_norm, attention_in, heads, weights, mixed, perceptron_norm, perceptron_in, hidden, activated
        )
        return stream + _linear(activated, parameters[f"{prefix}perceptron_out.weight"]), layer

    def _layer_backward(self, d_stream: Tensor, prefix: str, layer: _Layer, backward: "_Backward") -> Tensor:
        """Return the gradient of the layer's input, [R, N, D], given that of its output."""
        d_activated = backward.linear(d_stream, f"{prefix}perceptron_out.weight", layer.activated)
        d_hidden = torch.ops.aten.gelu_backward(d_activated, layer.hidden)
        d_in = backward.linear(d_hidden, f"{prefix}perceptron_in.weight", layer.perceptron_in)
        d_stream = backward.norm(d_in, f"{prefix}perceptron_norm.weight", layer.perceptron_norm).add_(d_stream)

        d_mixed = self._split(backward.linear(d_stream, f"{prefix}attention_out.weight", layer.mixed), 1)[0]
        d_heads = self._merge(self._attention_backward(d_mixed, layer), len(d_stream))
        d_in = backward.linear(d_heads, f"{prefix}query_key_value.weight", layer.attention_in)
        return backward.norm(d_in, f"{prefix}attention_norm.weight", layer.attention_norm).add_(d_stream)

    def _attention_backward(self, d_mixed: Tensor, layer: _Layer) -> Tensor:
        """Return the gradients of queries, keys and values, [3, R B H, T, D / H], given [R B H, T, D / H]."""
        query, key, value = layer.heads
        d_heads = torch.empty_like(layer.heads)
        d_query, d_key, d_value = d_heads
        torch.bmm(layer.weights.transpose(1, 2), d_mixed, out=d_value)
        d_weights = torch.bmm(d_mixed, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, layer.weights, -1, torch.float32)
        torch.baddbmm(d_query, d_scores, key, beta=0, alpha=self._scale, out=d_query)
        torch.baddbmm(d_key, d_scores.transpose(1, 2), query, beta=0, alpha=self._scale, out=d_key)
        return d_heads

    def _split(self, features: Tensor, parts: int) -> Tensor:
        """Copy [R, N, parts D] to [parts, R B H, T, D / H]."""
        heads, time = self.config.num_heads, self.config.context
        apart = features.view(-1, time, parts, heads, self.config.width // heads).permute(2, 0, 3, 1, 4)
        return apart.reshape(parts, -1, time, self.config.width // heads)

    def _merge(self, heads: Tensor, rows: int) -> Tensor:
        """Copy [parts, R B H, T, D / H] back to [R, N, parts D]."""
        parts, _, time, size = heads.shape
        apart = heads.view(parts, -1, self.config.num_heads, time, size)
        return apart.permute(1, 3, 0, 2, 4).reshape(rows, -1, parts * self.config.width)


class _Backward:
    """Backward passes of the parts that have parameters; collects the gradients of these by name."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.gradients: dict[str, Tensor] = {}
        self._parameters = parameters

    def linear(self, d_output: Tensor, name: str, inputs: Tensor) -> Tensor:
        """Return the gradient [R, N, in] of a linear map's input, given that of its output [R, N, out]."""
        self.gradients[name] = torch.bmm(d_output.transpose(1, 2), inputs)
        return torch.bmm(d_output, self._parameters[name])

    def norm(self, d_output: Tensor, name: str, norm: _Norm) -> Tensor:
        """Return the gradient [R, N, D] of a norm's input, given that of its output."""
        self.gradients[name] = (d_output * norm.unit).sum(1)
        d_unit = d_output * self._parameters[name][:, None]
        along = (d_unit * norm.unit).mean(-1, keepdim=True)
        return d_unit.addcmul_(norm.unit, along, value=-1).mul_(norm.inverse)


def _linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return inputs [R, N, in] times the transpose of weight [R, out, in]."""
    return torch.bmm(inputs, weight.transpose(1, 2))


def _norm(stream: Tensor, gain: Tensor) -> tuple[Tensor, _Norm]:
    """Return the root-mean-square norm of [R, N, D] with gains [R, D], and what its backward pass needs."""
    inverse = stream.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
    unit = stream * inverse
    return unit * gain[:, None], _Norm(unit, inverse)
