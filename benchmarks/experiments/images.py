"""The image task: workers train perceptrons with one hidden layer, on Fashion-MNIST or on arrays of the caller's."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data import Images, Part
from experiments.losses import cross_entropy_backward
from experiments.optimizers import SGD, AdamW
from experiments.stacked import StackedTask

ROWS_AT_ONCE = 4
"""Workers computed together: parameters and gradients of more (400 KB each) would not stay in a core's cache."""
MAIN_SHARE = 0.9
"""Share of its samples that a worker draws from its two classes alone, when sharded by class."""


class ImageTask(StackedTask):
    """Classification by a perceptron: loss in nats per image, accuracy as the share of images told right.

    Sharding "same" lets every worker draw from all training images, evenly and with replacement. "by-class" gives
    worker k two main classes, of 10 classes 2 k and 2 k + 1 + 2 floor(k / 5), modulo 10: with probability 0.9 a sample
    is drawn from their images, otherwise from all images (those of the main classes too). So workers 0 to 4, 5 to 9
    and so on have every class once as a main one, and the first 25 pairs are all different.
    """

    def __init__(
        self,
        images: Images,
        *,
        num_workers: int,
        optimizer: AdamW | SGD,
        seed: int,
        part: Part,
        sharding: Literal["same", "by-class"] = "same",
        hidden: int = 128,
        batch_size: int = 32,
    ) -> None:
        """Build the workers.

        Args:
            images: What there is to learn.
            num_workers: Workers, numbered from 0.
            optimizer: The inner optimizer of all of them.
            seed: Decides the first parameters, and with a worker's number its batches.
            part: What `evaluate` uses.
            sharding: What workers draw from.
            hidden: Hidden units.
            batch_size: Images of one inner step.
        """
        num_classes = int(images.train_labels.max()) + 1
        super().__init__(
            _initial(images.train.shape[1], hidden, num_classes, seed),
            num_workers=num_workers,
            optimizer=optimizer,
            seed=seed,
            tokens_per_step=batch_size,
            rows_at_once=ROWS_AT_ONCE,
        )
        self._inputs, self._labels = images.train, images.train_labels
        self._batch_size = batch_size
        self._evaluated = (
            (images.validation, images.validation_labels) if part == "validation" else (images.test, images.test_labels)
        )
        self._main_share = MAIN_SHARE if sharding == "by-class" else 0.0
        self._images_of = [(self._labels == label).nonzero()[:, 0] for label in range(num_classes)]

    def main_classes(self, worker: int) -> tuple[int, int]:
        """Return the two classes that a worker sees most, when sharded by class."""
        num_classes = len(self._images_of)
        lap, first = divmod(2 * worker, num_classes)
        apart = 1 + 2 * lap % (num_classes - num_classes % 2)  # odd, so that a lap of 10 classes has each of them once
        return first, (first + apart) % num_classes

    def draw(self, worker: int, num_steps: int, generator: torch.Generator) -> Tensor:
        """Return a worker's next images, int64 [num_steps, batch_size], as indexes of training images."""
        # One draw of two numbers for each sample, so that the stream doesn't depend on how many steps a call draws.
        chance = torch.rand(num_steps, self._batch_size, 2, generator=generator, dtype=torch.float64)
        anywhere = (chance[..., 1] * len(self._inputs)).long()
        if not self._main_share:
            return anywhere
        main = torch.cat([self._images_of[label] for label in self.main_classes(worker)])
        return torch.where(chance[..., 0] < self._main_share, main[(chance[..., 1] * len(main)).long()], anywhere)

    def compute_gradients(self, parameters: Mapping[str, Tensor], samples: Tensor, out: Tensor) -> None:
        """Compute each row's gradient of the mean loss of its images, whose indexes are `samples`."""
        gradients = self.layout.views(out)
        inputs = self._inputs[samples]
        activated, logits = _forward(parameters, inputs)
        d_logits = cross_entropy_backward(logits, self._labels[samples])
        torch.bmm(d_logits.transpose(1, 2), activated, out=gradients["output.weight"])
        torch.sum(d_logits, 1, out=gradients["output.bias"])
        d_hidden = torch.bmm(d_logits, parameters["output.weight"]).mul_(activated > 0)
        torch.bmm(d_hidden.transpose(1, 2), inputs, out=gradients["hidden.weight"])
        torch.sum(d_hidden, 1, out=gradients["hidden.bias"])

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return "loss" (nats per image) and "accuracy" (0 to 1) of one model on the part chosen at the start."""
        row = self.layout.views(self.layout.flatten(tensors)[None])
        inputs, labels = self._evaluated
        logits = _forward(row, inputs[None])[1][0]
        return {
            "loss": functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }


def _forward(parameters: Mapping[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden layer [R, B, hidden] after its ReLU and the logits [R, B, classes] of inputs [R, B, pixels]."""
    hidden = torch.bmm(inputs, parameters["hidden.weight"].transpose(1, 2)).add_(parameters["hidden.bias"][:, None])
    activated = hidden.relu_()
    logits = torch.bmm(activated, parameters["output.weight"].transpose(1, 2)).add_(parameters["output.bias"][:, None])
    return activated, logits


def _initial(num_pixels: int, hidden: int, num_classes: int, seed: int) -> dict[str, Tensor]:
    """Return first parameters that depend on nothing but `seed`, as `nn.Linear` chooses them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"hidden": nn.Linear(num_pixels, hidden), "output": nn.Linear(hidden, num_classes)}
    return {
        f"{name}.{part}": parameter.detach()
        for name, layer in layers.items()
        for part, parameter in layer.named_parameters()
    }
