"""The demo's model: a small decoder-only transformer over bytes, plain enough to be read in a minute."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BYTES = 256
"""The vocabulary: every byte is a token."""

SEQUENCES_AT_ONCE = 64
"""Sequences that an evaluation runs through the model together; more would only take memory."""

# Shapes below: B sequences, T positions, D width, H heads.


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; the defaults make 119,104 parameters."""

    context: int = 64
    """Bytes it sees at once."""
    width: int = 64
    """Features per position."""
    num_heads: int = 4
    """Attention heads; `width` is a multiple of it."""
    num_layers: int = 2
    """Blocks of attention and perceptron."""


class Block(nn.Module):
    """Pre-norm causal attention, then a perceptron, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.perceptron_norm = nn.RMSNorm(config.width)
        self.perceptron_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.perceptron_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the stream [B, T, D] with this block's two contributions added."""
        batch, time, width = stream.shape
        heads = self.query_key_value(self.attention_norm(stream)).view(batch, time, 3 * self.num_heads, -1)
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)  # each [B, H, T, D / H]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden = functional.gelu(self.perceptron_in(self.perceptron_norm(stream)))  # [B, T, 4 D]
        added: Tensor = self.perceptron_out(hidden)
        return stream + added


class ByteTransformer(nn.Module):
    """Predicts the next byte from the ones before; input and output embeddings are one tensor (tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(NUM_BYTES, config.width)
        self.position = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name != "position":
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [B, T, 256] of the byte that follows each of the inputs [B, T]."""
        stream = self.embedding(inputs) + self.position[: inputs.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return functional.linear(self.norm(stream), self.embedding.weight)


def build_model(config: ModelConfig, seed: int) -> ByteTransformer:
    """Build the model with parameters that depend on nothing but `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteTransformer(config)


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over int64 [B, T] inputs and targets: nats per byte, differentiable."""
    logits: Tensor = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the mean loss over all sequences, in nats per byte, taking no gradient."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(inputs), SEQUENCES_AT_ONCE):
            part = slice(start, start + SEQUENCES_AT_ONCE)
            total += next_byte_loss(model, inputs[part], targets[part]).item() * len(inputs[part])
    return total / len(inputs)
