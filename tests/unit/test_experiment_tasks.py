"""The simulator's tasks: stacked workers train exactly as single models do with torch's own optimizers."""

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data import (
    FASHION_MNIST_VARIABLE,
    Images,
    Text,
    divide_by_source,
    load_fashion_mnist,
    load_text,
    read_idx,
    split_images,
)
from experiments.images import ImageTask
from experiments.optimizers import SGD, AdamW, learning_rate
from experiments.stacked import StackedTask
from experiments.text import TextTask
from paceline.demo.data import load_corpus
from paceline.demo.model import ModelConfig, build_model, evaluate, next_byte_loss
from paceline_wire.errors import InvalidInputError

SMALL = ModelConfig(context=16, width=8, num_heads=2, num_layers=2)
NUM_CLASSES = 10


class RecordingText(TextTask):
    """A text task that keeps the batches it computed gradients of; for one worker."""

    batches: list[tuple[Tensor, Tensor]]

    def compute_gradients(self, parameters: Mapping[str, Tensor], samples: Tensor, out: Tensor) -> None:
        """Keep the inputs and targets, int64 [B, T]."""
        windows = self._sequences(self._data, samples[0])
        self.batches.append((windows[:, :-1], windows[:, 1:]))
        super().compute_gradients(parameters, samples, out)


class RecordingImages(ImageTask):
    """An image task that keeps the indexes of the images it computed gradients of; for one worker."""

    batches: list[Tensor]

    def compute_gradients(self, parameters: Mapping[str, Tensor], samples: Tensor, out: Tensor) -> None:
        """Keep the indexes, int64 [B]."""
        self.batches.append(samples[0])
        super().compute_gradients(parameters, samples, out)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the experiments do: how work is split among threads may depend on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text() -> Text:
    """The real corpus."""
    return load_text()


@pytest.fixture(scope="module")
def images() -> Images:
    """600 noisy pictures of 20 pixels, 500 of them for training, that can be told apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(700, dtype=np.uint8) % NUM_CLASSES
    patterns = rng.integers(0, 200, (NUM_CLASSES, 4, 5))
    pixels = (patterns[labels] + rng.integers(0, 50, (700, 4, 5))).astype(np.uint8)
    return split_images(pixels[:600], labels[:600], pixels[600:], labels[600:], num_validation=100)


def text_task(text: Text, num_workers: int, kind: type[TextTask] = TextTask, **changes: Any) -> TextTask:
    """Build a small text task."""
    optimizer = AdamW(rate=0.01, total_steps=40)
    settings = {"optimizer": optimizer, "seed": 3, "part": "validation", "model": SMALL, "evaluation_sequences": 24}
    return kind(text, num_workers=num_workers, **{**settings, **changes})


def image_task(images: Images, num_workers: int, kind: type[ImageTask] = ImageTask, **changes: Any) -> ImageTask:
    """Build a small image task."""
    settings = {"optimizer": SGD(rate=0.1, momentum=0.9), "seed": 3, "part": "test", "hidden": 12, "batch_size": 8}
    return kind(images, num_workers=num_workers, **{**settings, **changes})


def row(task: StackedTask, worker: int) -> Tensor:
    """Copy a worker's parameters, float32 [P]."""
    return torch.cat([tensor.flatten() for tensor in task.tensors(worker).values()])


def perceptron(task: ImageTask) -> nn.Sequential:
    """Build the ordinary model that worker 0 is a copy of."""
    tensors = task.tensors(0)
    hidden, pixels = tensors["hidden.weight"].shape
    model = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES))
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), tensors.values(), strict=True):
            parameter.copy_(tensor)
    return model


def test_text_trains_as_torch_does(text: Text) -> None:
    """Forty steps: the hand-written transformer, clipping, schedule and AdamW equal the demo's model with torch's."""
    task = text_task(text, 1, RecordingText)
    assert isinstance(task, RecordingText)
    task.batches = []
    model = build_model(SMALL, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    task.advance({0: 40})
    assert len(task.batches) == 40
    for taken, (inputs, targets) in enumerate(task.batches):
        optimizer.param_groups[0]["lr"] = learning_rate(0.01, taken, 40)
        next_byte_loss(model, inputs, targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(task.tensors(0)[name], parameter.detach(), rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("sizes", [SMALL, ModelConfig(context=64, width=32, num_heads=2, num_layers=2)])
def test_text_gradient_is_autograds(text: Text, sizes: ModelConfig) -> None:
    """With rate 1 and no momentum, one step subtracts the gradient that autograd computes, gains other than 1 too."""
    task = text_task(text, 1, RecordingText, model=sizes, optimizer=SGD())
    assert isinstance(task, RecordingText)
    task.batches = []
    model = build_model(sizes, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1)
            task.tensors(0)[name].copy_(parameter)
    task.advance({0: 1})
    next_byte_loss(model, *task.batches[0]).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(task.tensors(0)[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_images_train_as_torch_does(images: Images, momentum: float) -> None:
    """Thirty steps of the hand-written perceptron equal torch's SGD, the momentum too."""
    task = image_task(images, 1, RecordingImages, optimizer=SGD(rate=0.1, momentum=momentum))
    assert isinstance(task, RecordingImages)
    task.batches = []
    model = perceptron(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    task.advance({0: 30})
    for batch in task.batches:
        loss = functional.cross_entropy(model(images.train[batch]), images.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        optimizer.step()
    for parameter, name in zip(model.parameters(), task.tensors(0), strict=True):
        torch.testing.assert_close(task.tensors(0)[name], parameter.detach(), rtol=0, atol=1e-6, msg=name)
        if momentum:
            buffer = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(task.momentum(0)[name], 0.1 * buffer, rtol=0, atol=1e-6, msg=name)


def test_adamw_rows_are_torchs_adamw() -> None:
    """Rows at different steps, with gradients above and below the clipping norm, equal single optimizers."""
    generator = torch.Generator().manual_seed(0)
    totals = [10, 20, 30]
    rows = AdamW(rate=0.02, total_steps=totals).build(3, 50)
    parameters = torch.randn(3, 50, generator=generator)
    singles = [nn.Parameter(values.clone()) for values in parameters]
    optimizers = [torch.optim.AdamW([single], betas=(0.9, 0.95), weight_decay=0.1) for single in singles]
    taken = [0, 0, 0]
    for step in range(30):
        workers = [worker for worker in range(3) if step % (worker + 1) == 0]
        gradients = torch.randn(len(workers), 50, generator=generator) * (0.05 if step % 4 else 1.0)
        for worker, gradient in zip(workers, gradients.clone(), strict=True):
            optimizers[worker].param_groups[0]["lr"] = learning_rate(0.02, taken[worker], totals[worker])
            singles[worker].grad = gradient
            torch.nn.utils.clip_grad_norm_([singles[worker]], 1.0)
            optimizers[worker].step()
            taken[worker] += 1
        block, state = parameters[workers], [moments[workers] for moments in rows.state]
        rows.step(workers, block, gradients, state)
        for stack, rows_of_stack in zip((parameters, *rows.state), (block, *state), strict=True):
            stack[workers] = rows_of_stack
    for worker, single in enumerate(singles):
        torch.testing.assert_close(parameters[worker], single.detach(), rtol=0, atol=1e-6)


def test_rate_rises_and_falls() -> None:
    """A twentieth of the steps to rise, a tenth of the peak at the end and after it."""
    rates = [learning_rate(2.0, taken, 100) for taken in (0, 4, 50, 100, 500)]
    assert rates == pytest.approx([0.4, 2 * (1 - 0.9 * 0.04), 1.1, 0.2, 0.2])


@pytest.mark.parametrize("kind", ["text", "images", "full size"])
def test_a_worker_does_not_depend_on_those_beside_it(text: Text, images: Images, kind: str) -> None:
    """Together or one at a time, in one call or in several, in any order: the same bits."""

    def build() -> StackedTask:
        if kind == "images":
            return image_task(images, 11, sharding="by-class")
        return text_task(text, 11, model=SMALL if kind == "text" else ModelConfig(width=32, num_heads=2))

    steps = {7: 3, 0: 1, 3: 3, 4: 3, 10: 2, 5: 0, 9: 5, 1: 4}
    together, alone = build(), build()
    together.advance(steps)
    for worker, num in reversed(steps.items()):
        for _ in range(num):
            alone.advance({worker: 1})
    for worker in range(11):
        assert torch.equal(row(together, worker), row(alone, worker)), worker
        assert torch.equal(row(together, worker), row(build(), worker)) == (steps.get(worker, 0) == 0), worker


def test_all_rows_at_once_equal_some(text: Text) -> None:
    """Advancing every worker, which copies nothing, gives the bits that gathered rows give."""
    everyone, gathered = text_task(text, 4), text_task(text, 4)
    everyone.advance(dict.fromkeys(range(4), 3))
    gathered.advance({0: 3, 2: 3})
    gathered.advance({1: 3, 3: 3})
    for worker in range(4):
        assert torch.equal(row(everyone, worker), row(gathered, worker))


def test_seed_decides(text: Text) -> None:
    """The same seed gives the same bits, another one other parameters; workers start alike and draw differently."""
    tasks = [text_task(text, 2, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(row(tasks[0], 0), row(tasks[0], 1))
    assert not torch.equal(row(tasks[0], 0), row(tasks[2], 0))
    for task in tasks:
        task.advance({0: 4, 1: 4})
    assert torch.equal(row(tasks[0], 1), row(tasks[1], 1))
    assert not torch.equal(row(tasks[0], 0), row(tasks[0], 1))


def test_tensors_are_live_views(images: Images) -> None:
    """What the simulator writes is what trains on, and training shows in what it holds."""
    task, other = image_task(images, 3, optimizer=SGD()), image_task(images, 3, optimizer=SGD())
    held = task.tensors(1)
    for name, tensor in held.items():
        tensor.add_(0.25)
        other.tensors(1)[name].copy_(tensor)
    task.advance({1: 2})
    other.advance({1: 2})
    assert all(torch.equal(held[name], other.tensors(1)[name]) for name in held)
    assert torch.equal(row(task, 0), row(task, 2))


def test_momentum_is_live_and_can_be_reset(images: Images) -> None:
    """Momentum of one worker is read, zeroed alone, and lost on a restart."""
    task = image_task(images, 3)
    task.advance({0: 2, 1: 2, 2: 2})
    assert all(tensor.abs().max() > 0 for worker in range(3) for tensor in task.momentum(worker).values())
    task.reset_momentum(0)
    task.restart(1)
    largest = [max(tensor.abs().max().item() for tensor in task.momentum(worker).values()) for worker in range(3)]
    assert largest[:2] == [0, 0]
    assert largest[2] > 0


def test_momentum_that_is_not_there(images: Images, text: Text) -> None:
    """Plain SGD and AdamW have no local momentum, and say so."""
    for task in (image_task(images, 1, optimizer=SGD()), text_task(text, 1)):
        with pytest.raises(InvalidInputError, match="momentum"):
            task.momentum(0)
        with pytest.raises(InvalidInputError, match="momentum"):
            task.reset_momentum(0)
        task.restart(0)


def test_restart_forgets_adams_state(text: Text) -> None:
    """After a restart, Adam's next step is a first one: about the rate in every direction that has a gradient."""
    task = text_task(text, 2, optimizer=AdamW(rate=0.01, total_steps=40, weight_decay=0.0))
    task.advance({0: 20, 1: 20})
    before = row(task, 0)
    task.restart(0)
    task.advance({0: 1})
    moved = (row(task, 0) - before).abs()
    rate = learning_rate(0.01, 20, 40)
    assert moved.max().item() == pytest.approx(rate, rel=1e-3)
    assert moved.median().item() == pytest.approx(rate, rel=1e-2)


def test_wrong_number_of_totals(text: Text) -> None:
    """There is one planned number of steps for all workers, or one for each."""
    with pytest.raises(ValueError, match="total_steps"):
        text_task(text, 3, optimizer=AdamW(rate=0.01, total_steps=[5, 5]))


def test_text_evaluation_is_the_models(text: Text) -> None:
    """Loss and accuracy equal those of the ordinary model; the two parts differ."""
    model = build_model(SMALL, seed=9)
    parameters = dict(model.named_parameters())
    results = []
    for part in ("validation", "test"):
        task = text_task(text, 1, part=part)
        inputs, targets = task._evaluated[:, :-1], task._evaluated[:, 1:]
        result = task.evaluate(parameters)
        right = (model(inputs).argmax(-1) == targets).float().mean().item()
        assert result["loss"] == pytest.approx(evaluate(model, inputs, targets), rel=1e-5)
        assert result["accuracy"] == pytest.approx(right)
        results.append(result["loss"])
    assert results[0] != results[1]


def test_text_learns(text: Text) -> None:
    """Forty steps bring the loss well below that of guessing at random, ln 256 = 5.545."""
    task = text_task(text, 1, optimizer=AdamW(rate=0.02, total_steps=40))
    task.advance({0: 40})
    assert task.evaluate(task.tensors(0))["loss"] < 4.5


def test_images_learn_and_are_evaluated(images: Images) -> None:
    """The patterns are learnt, and the numbers are those of an ordinary model on the chosen part."""
    task = image_task(images, 1)
    task.advance({0: 100})
    model = perceptron(task)
    with torch.no_grad():
        logits = model(images.test)
    result = task.evaluate(task.tensors(0))
    assert result["loss"] == pytest.approx(functional.cross_entropy(logits, images.test_labels).item(), rel=1e-4)
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == images.test_labels).float().mean().item())
    assert result["accuracy"] > 0.9


def test_other_parameters_are_refused(images: Images) -> None:
    """Evaluating tensors of other names is an error that lists both."""
    task = image_task(images, 1)
    with pytest.raises(InvalidInputError, match=r"hidden\.weight"):
        task.evaluate({"weight": torch.zeros(3)})


def test_text_parts_are_whole_files(text: Text) -> None:
    """No file is on two sides; the held-out ones are the demo's, and each part has a fair share of their bytes."""
    corpus = load_corpus()
    assert tuple(text.train) == corpus.train_files
    assert sorted([*text.validation, *text.test]) == list(corpus.held_out_files)
    sizes = [sum(map(len, part.values())) for part in (text.validation, text.test)]
    assert sum(sizes) == len(corpus.held_out)
    assert min(sizes) > 0.25 * sum(sizes)


@pytest.mark.parametrize("num_workers", [1, 4, 16, 64])
def test_sources_are_divided_evenly(text: Text, num_workers: int) -> None:
    """Every file goes to one worker, and no worker has less than half or more than twice its fair share of bytes."""
    workers = divide_by_source(text.train, num_workers)
    assert sorted(path for paths in workers for path in paths) == sorted(text.train)
    shares = [sum(len(text.train[path]) for path in paths) * num_workers for paths in workers]
    total = sum(map(len, text.train.values()))
    assert 0.5 * total < min(shares) <= max(shares) < 2 * total


def test_packages_stay_together() -> None:
    """Files of one package go to one worker while that is no more than its share."""
    files = {"a/x.py": b"1" * 30, "a/y.py": b"2" * 30, "b.py": b"3" * 50, "c.py": b"4" * 10}
    assert divide_by_source(files, 2) == [["a/x.py", "a/y.py"], ["b.py", "c.py"]]
    with pytest.raises(ValueError, match="not enough"):
        divide_by_source(files, 5)


def test_workers_draw_from_their_own_sources(text: Text) -> None:
    """By source, a worker's sequences lie in its own files; all together they are the same bytes as ever."""
    task = text_task(text, 3, sharding="by-source", batch_size=50)
    workers = divide_by_source(text.train, 3)
    for worker, (begin, end) in enumerate(task._ranges):
        own = b"".join(text.train[path] for path in workers[worker])
        assert bytes(task._data[begin:end].tolist()) == own
        starts = task.draw(worker, 20, torch.Generator().manual_seed(worker))
        assert starts.shape == (20, 50)
        assert begin <= starts.min() <= starts.max() < end - SMALL.context


def test_workers_see_mostly_their_classes(images: Images) -> None:
    """By class, nine tenths of the samples and the chance hits of the rest are of the worker's two classes."""
    task = image_task(images, 7, sharding="by-class", batch_size=100)
    assert [task.main_classes(worker) for worker in (0, 1, 4, 5, 6, 9)] == [
        (0, 1),
        (2, 3),
        (8, 9),
        (0, 3),
        (2, 5),
        (8, 1),
    ]
    drawn = images.train_labels[task.draw(5, 100, torch.Generator().manual_seed(0))]
    shares = torch.bincount(drawn.flatten(), minlength=NUM_CLASSES) / drawn.numel()
    assert shares[[0, 3]].tolist() == pytest.approx([0.46, 0.46], abs=0.02)
    assert shares[[1, 2, 4, 5, 6, 7, 8, 9]].tolist() == pytest.approx([0.01] * 8, abs=0.006)
    pairs = {frozenset(task.main_classes(worker)) for worker in range(25)}
    assert len(pairs) == 25
    assert all(len(pair) == 2 for pair in pairs)


def test_images_are_normalised_by_the_training_part(images: Images) -> None:
    """Training pixels have mean 0 and deviation 1; sizes are as asked."""
    assert [len(part) for part in (images.train, images.validation, images.test)] == [500, 100, 100]
    assert images.train.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.train.std().item() == pytest.approx(1, abs=1e-3)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write bytes as a compressed IDX file."""
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), 1))


def test_fashion_mnist_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four files in the folder that the variable names become the three parts."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (5010, 2, 3), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5010, dtype=np.uint8))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", train[:7])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(7, dtype=np.uint8))
    monkeypatch.setenv(FASHION_MNIST_VARIABLE, str(tmp_path))
    images = load_fashion_mnist()
    assert (images.train.shape, images.validation.shape, images.test.shape) == ((10, 6), (5000, 6), (7, 6))
    assert images.test_labels.tolist() == list(range(7))
    assert torch.equal(images.test, images.train[:7])


def test_missing_fashion_mnist(tmp_path: Path) -> None:
    """The message names the package and the variable."""
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*FASHION_MNIST_DIR"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x09\1\0\0\0\1\0", b"\0\0\x08\1\0\0", b"\0\0\x08\1\0\0\0\2\0"])
def test_damaged_idx(tmp_path: Path, content: bytes) -> None:
    """A file that isn't IDX of bytes, or whose size differs from its header, is refused by name."""
    path = tmp_path / "damaged.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"damaged\.gz"):
        read_idx(path)


def test_too_little_text(tmp_path: Path, text: Text) -> None:
    """A folder without source and a shard shorter than a sequence are refused."""
    with pytest.raises(FileNotFoundError, match="too little"):
        load_text(tmp_path)
    with pytest.raises(ValueError, match="too few"):
        text_task(Text(train={"a.py": b"x" * 10}, validation=text.validation, test=text.test), 1)
