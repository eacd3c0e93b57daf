"""What the codecs and a fragment's arithmetic cost beside memory: each against a copy of as many bytes, in one run.

    python benchmarks/kernels.py --json > benchmarks/results/kernels.json

For every dense codec and each number of threads: encode, the guard's checked norm, decode, apply a push to w and u with
a bin that opens, encode with error feedback, and the two sides of a difference; all through the calls that server and
client make, fragment by fragment (4 Mi elements) on a thread pool, as the server does it. After each operation follows
a copy with the same threads: of a tensor for encode, else one that reads and writes as many bytes as the operation must
(apply int8: 1 + 4 + 4 read, 4 + 4 written: a copy of 8.5 bytes per parameter). The ratio is the median over such pairs.
`plain` is the same in torch operations, as it is where numba is not.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from paceline_server.fragment import FragmentValues
from paceline_server.guard import checked_norm
from paceline_server.ledger import Decision, Outcome
from paceline_server.rules.base import Contribution
from paceline_server.rules.ordered_momentum import OrderedMomentum
from paceline_server.rules.rates import Rates
from paceline_wire.codecs import Codec, codec, compensate, encode, kernels
from paceline_wire.codecs.compiled import CompiledCodec
from paceline_wire.codecs.moves import encode_move, follow_move
from paceline_wire.memory import keep_large_buffers

FRAGMENT = 4 * 1024 * 1024
DENSE = ("fp32", "bf16", "int8", "int4", "fp4")
RULE = OrderedMomentum(rates=Rates(peak_lr=0.7, full_momentum=0.9))
PUSH = Decision(
    outcome=Outcome.APPLIED, reason="", contribution=Contribution(bins_late=0, share=0.25), bins_opened_after=1
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something done to every fragment.

    Attributes:
        codec: Name of the codec.
        name: What is done.
        num_bytes: Bytes per parameter that it must read and write, together.
        work: Does it to a fragment, by its number.
    """

    codec: str
    name: str
    num_bytes: float
    work: Callable[[int], Any]


class Memory:
    """The numbers of a model in fragments, and room for the yardstick.

    Args:
        num_fragments: How many fragments.
    """

    def __init__(self, num_fragments: int) -> None:
        self.num_fragments = num_fragments
        shape = (num_fragments, FRAGMENT)
        self.values, self.residuals, self.references = (
            torch.randn(shape),
            torch.randn(shape).mul_(0.01),
            torch.zeros(shape),
        )
        self.decoded = torch.zeros(shape)
        self.fragments = [FragmentValues(w, RULE) for w in torch.randn(shape)]
        self._source, self._target = (torch.ones(num_fragments, 10 * FRAGMENT, dtype=torch.uint8) for _ in range(2))

    def copy(self, fragment: int, num_bytes: float) -> None:
        """Copy half of num_bytes per parameter: so many are read and written together."""
        half = int(num_bytes / 2 * FRAGMENT)
        self._target[fragment, :half].copy_(self._source[fragment, :half])

    def operations(self, used: Codec) -> list[Operation]:
        """All operations of a codec."""
        payloads = [encode(used, values) for values in self.values]
        coded = used.encoded_bytes(FRAGMENT) / FRAGMENT
        does: list[tuple[str, float, Callable[[int], Any]]] = [
            ("encode", 8, lambda i: used.encode(self.values[i], payloads[i])),
            ("norm", coded, lambda i: checked_norm(used, payloads[i], FRAGMENT)),
            ("decode", 4 + coded, lambda i: used.decode_range(payloads[i], FRAGMENT, 0, self.decoded[i])),
            ("apply", 16 + coded, lambda i: self.fragments[i].follow(PUSH, used, payloads[i])),
            ("follow a difference", 8 + coded, lambda i: follow_move(used, payloads[i], self.references[i])),
            ("encode a difference", 12 + coded, lambda i: encode_move(used, self.values[i], self.references[i])),
            ("encode, error feedback", 12 + coded, lambda i: compensate(used, self.values[i], self.residuals[i])),
        ]
        return [Operation(codec=used.name, name=name, num_bytes=size, work=work) for name, size, work in does]


def seconds(pool: ThreadPoolExecutor, work: Callable[[int], Any], num_fragments: int) -> float:
    """How long a thread pool takes for all fragments."""
    began_s = time.perf_counter()
    for _ in pool.map(work, range(num_fragments)):
        pass
    return time.perf_counter() - began_s


def measured(memory: Memory, operations: Sequence[Operation], threads: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per 100 M parameters of each operation and of its yardstick, and the median of their ratios."""
    times: list[list[tuple[float, float]]] = [[] for _ in operations]
    with ThreadPoolExecutor(threads) as pool:
        for repeat in range(repeats + 1):
            for operation, pairs in zip(operations, times, strict=True):
                took_s = seconds(pool, operation.work, memory.num_fragments)
                copy_s = seconds(pool, lambda i, size=operation.num_bytes: memory.copy(i, size), memory.num_fragments)  # type: ignore[misc]  # the default binds this turn's size
                if repeat:
                    pairs.append((took_s, copy_s))
    scale = 1e3 * 100e6 / (memory.num_fragments * FRAGMENT)
    return [
        {
            "codec": operation.codec,
            "operation": operation.name,
            "threads": threads,
            "bytes_per_parameter": round(operation.num_bytes, 3),
            "ms_per_100m": round(statistics.median(took for took, _ in pairs) * scale, 1),
            "copy_ms_per_100m": round(statistics.median(copied for _, copied in pairs) * scale, 1),
            "ratio": round(statistics.median(took / copied for took, copied in pairs), 3),
        }
        for operation, pairs in zip(operations, times, strict=True)
    ]


def run(
    parameters: int, threads: Sequence[int], repeats: int, plain_repeats: int, names: Sequence[str]
) -> dict[str, Any]:
    """Measure everything."""
    torch.set_num_threads(1)
    keep_large_buffers()
    memory = Memory(max(1, parameters // FRAGMENT))
    compiled = [codec(name) for name in names]
    plain = [used.plain for used in compiled if isinstance(used, CompiledCodec)]
    began_s = time.perf_counter()
    loaded = kernels.load() is not None
    load_s = time.perf_counter() - began_s
    result: dict[str, Any] = {"load_s": round(load_s, 2), "compiled": [], "plain": []}
    for number in threads:
        for way, used, turns in (("compiled", compiled, repeats if loaded else 0), ("plain", plain, plain_repeats)):
            for one in used if turns else ():
                result[way] += measured(memory, memory.operations(one), number, turns)
    return {
        "parameters": memory.num_fragments * FRAGMENT,
        "repeats": repeats,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("numpy", "torch", *(("numba", "llvmlite") if loaded else ()))}
        | {"python": platform.python_version()},
        **result,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--plain-repeats", type=int, default=1)
    parser.add_argument("--codecs", nargs="+", choices=DENSE, default=list(DENSE))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = run(arguments.parameters, arguments.threads, arguments.repeats, arguments.plain_repeats, arguments.codecs)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['parameters']:,} parameters, {result['machine']}; kernels loaded in {result['load_s']} s")
    print(f"{'way':9}{'codec':6}{'operation':24}{'threads':>8}{'ms':>9}{'copy':>8}{'ratio':>8}")
    for way in ("compiled", "plain"):
        for row in result[way]:
            print(
                f"{way:9}{row['codec']:6}{row['operation']:24}{row['threads']:8}{row['ms_per_100m']:9.1f}"
                f"{row['copy_ms_per_100m']:8.1f}{row['ratio']:8.2f}"
            )


if __name__ == "__main__":
    main()
