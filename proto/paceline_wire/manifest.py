"""The manifest: which tensors a run exchanges, and the fragment plan that both sides derive from it.

The plan is a pure function of the manifest:

1. Tensors are in ascending order of name. Those of equal (role, dtype) form a group; groups are in ascending order of
   (role, dtype), as numbered on the wire.
2. A group's tensors, flattened in row-major order, are laid end to end. A group of n elements is cut into
   ceil(n / fragment_elements) fragments of equal size, rounded up to a multiple of 256; the last takes what is left.
3. Fragments are numbered in that order. Fragment f lives on shard f modulo the number of shards.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from paceline_wire.codecs.base import BLOCK_ELEMENTS
from paceline_wire.errors import InvalidInputError
from paceline_wire.v1 import parameter_server_pb2 as pb

DEFAULT_FRAGMENT_ELEMENTS = 4 * 1024 * 1024
MAX_FRAGMENT_ELEMENTS = 16 * 1024 * 1024
MAX_TENSORS = 1_000_000
MAX_FRAGMENTS = 1 << 17
"""A plan of so many takes a shard half a second and 170 MiB; a hostile manifest of one line can ask for that."""

MAX_ELEMENTS = 1 << 44
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 64
"""As many as torch allows. It also bounds the number of elements, a product that a hostile shape makes endless."""

_DTYPES = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
}
_ROLES = {"parameter": pb.ROLE_PARAMETER, "averaged": pb.ROLE_AVERAGED}
EXCHANGED_DTYPES = tuple(_DTYPES)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One exchanged tensor.

    Attributes:
        name: Its name in the model's state.
        shape: Its extents; () for 0-d, and an extent may be 0.
        dtype: "float32", "bfloat16" or "float16".
        role: "parameter" (the outer rule applies) or "averaged" (a floating buffer, averaged without momentum).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str

    def __post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= MAX_NAME_BYTES:
            raise InvalidInputError(
                f"tensor name of {len(self.name.encode())} bytes; allowed are 1 to {MAX_NAME_BYTES}"
            )
        if self.dtype not in _DTYPES:
            raise InvalidInputError(
                f"tensor {self.name!r} is {self.dtype}; only {', '.join(_DTYPES)} can be exchanged: "
                "convert it, or freeze it to leave it out"
            )
        if self.role not in _ROLES:
            raise InvalidInputError(f"tensor {self.name!r} has role {self.role!r}; allowed are {', '.join(_ROLES)}")
        if len(self.shape) > MAX_DIMENSIONS:
            raise InvalidInputError(
                f"tensor {self.name!r} has {len(self.shape)} dimensions; at most {MAX_DIMENSIONS} are allowed"
            )
        if any(extent < 0 for extent in self.shape):
            raise InvalidInputError(f"tensor {self.name!r} has a negative extent: {self.shape}")

    @cached_property
    def num_elements(self) -> int:
        """Product of the extents."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)} ({self.role})"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of elements that lies both in one tensor and in one fragment.

    Attributes:
        tensor: Name of the tensor.
        tensor_start: First element in the flattened tensor.
        fragment_start: First element in the fragment.
        length: Number of elements, at least 1.
    """

    tensor: str
    tensor_start: int
    fragment_start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A contiguous piece of one group of tensors, at most fragment_elements long.

    Attributes:
        index: Its number in the plan.
        role: The role of its tensors.
        dtype: The dtype of its tensors in the model.
        num_elements: Its size.
        segments: What it consists of, in order, without gaps.
    """

    index: int
    role: str
    dtype: str
    num_elements: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Manifest:
    """The exchanged tensors in ascending order of name, and the largest fragment.

    Attributes:
        tensors: All exchanged tensors.
        fragment_elements: Largest number of elements in a fragment, a multiple of 256.
    """

    tensors: tuple[TensorSpec, ...]
    fragment_elements: int = DEFAULT_FRAGMENT_ELEMENTS

    def __post_init__(self) -> None:
        size = self.fragment_elements
        if not BLOCK_ELEMENTS <= size <= MAX_FRAGMENT_ELEMENTS or size % BLOCK_ELEMENTS:
            raise InvalidInputError(
                f"fragment_elements is {size}; it must be a multiple of {BLOCK_ELEMENTS} "
                f"from {BLOCK_ELEMENTS} to {MAX_FRAGMENT_ELEMENTS}"
            )
        if len(self.tensors) > MAX_TENSORS:
            raise InvalidInputError(f"the manifest has {len(self.tensors)} tensors; at most {MAX_TENSORS} are allowed")
        names = [tensor.name for tensor in self.tensors]
        for before, after in pairwise(names):
            if before >= after:
                raise InvalidInputError(
                    f"tensor {after!r} follows {before!r}; names must be unique and in ascending order"
                )
        total = self.num_elements
        if total > min(MAX_ELEMENTS, MAX_FRAGMENTS * size):
            raise InvalidInputError(
                f"the manifest has {total} elements, more than {MAX_FRAGMENTS} fragments of {size} can hold: "
                "raise exchange.fragment_elements"
            )

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec], fragment_elements: int = DEFAULT_FRAGMENT_ELEMENTS) -> "Manifest":
        """The manifest of tensors in any order."""
        return cls(tuple(sorted(tensors, key=lambda tensor: tensor.name)), fragment_elements)

    @property
    def num_elements(self) -> int:
        """Elements in all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """The fragment plan, see the module's first lines."""

        def group(tensor: TensorSpec) -> tuple[int, int]:
            return _ROLES[tensor.role], _DTYPES[tensor.dtype]

        fragments: list[Fragment] = []
        for _, members in groupby(sorted(self.tensors, key=group), key=group):
            fragments.extend(_cut(list(members), self.fragment_elements, len(fragments)))
        return tuple(fragments)

    def fragments_of_shard(self, shard: int, num_shards: int) -> tuple[Fragment, ...]:
        """The fragments that live on one of num_shards shards.

        Raises:
            InvalidInputError: There is no such shard.
        """
        if not 0 <= shard < num_shards:
            raise InvalidInputError(f"there is no shard {shard} among {num_shards}")
        return self.fragments[shard::num_shards]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, in hexadecimal: equal for equal manifests only."""
        return hashlib.sha256(self.to_wire().SerializeToString(deterministic=True)).hexdigest()

    def difference(self, other: "Manifest") -> str | None:
        """A phrase naming the first difference to another manifest (self is "here"), or None if they are equal."""
        if self == other:
            return None
        here = {tensor.name: tensor for tensor in self.tensors}
        there = {tensor.name: tensor for tensor in other.tensors}
        for name in sorted(here.keys() | there.keys()):
            if name not in there:
                return f"tensor {here[name]} is missing there"
            if name not in here:
                return f"tensor {there[name]} is missing here"
            if here[name] != there[name]:
                return f"tensor {name!r} is {here[name]} here and {there[name]} there"
        return f"fragment_elements is {self.fragment_elements} here and {other.fragment_elements} there"

    @cached_property
    def wire(self) -> pb.Manifest:
        """The message for this manifest, made once; it MUST NOT be changed."""
        return self.to_wire()

    def to_wire(self) -> pb.Manifest:
        """The message for this manifest."""
        return pb.Manifest(
            tensors=[
                pb.Tensor(name=tensor.name, shape=tensor.shape, dtype=_DTYPES[tensor.dtype], role=_ROLES[tensor.role])
                for tensor in self.tensors
            ],
            fragment_elements=self.fragment_elements,
        )

    @classmethod
    def from_wire(cls, message: pb.Manifest) -> "Manifest":
        """The manifest in a message.

        Raises:
            InvalidInputError: The message breaks a rule of the manifest; the text says which tensor and why.
        """
        if len(message.tensors) > MAX_TENSORS:
            raise InvalidInputError(
                f"the manifest has {len(message.tensors)} tensors; at most {MAX_TENSORS} are allowed"
            )
        return cls(tuple(_tensor_from_wire(tensor) for tensor in message.tensors), int(message.fragment_elements))


def _tensor_from_wire(message: pb.Tensor) -> TensorSpec:
    dtype = next((name for name, value in _DTYPES.items() if value == message.dtype), f"dtype {message.dtype}")
    role = next((name for name, value in _ROLES.items() if value == message.role), f"role {message.role}")
    return TensorSpec(name=message.name, shape=tuple(message.shape), dtype=dtype, role=role)


def _cut(members: list[TensorSpec], fragment_elements: int, first_index: int) -> Iterator[Fragment]:
    """Cut the tensors of one group, laid end to end, into fragments numbered from first_index."""
    remaining = sum(tensor.num_elements for tensor in members)
    if remaining == 0:
        return
    num_fragments = -(-remaining // fragment_elements)
    size = -(-remaining // num_fragments)
    size = -(-size // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    index = first_index
    segments: list[Segment] = []
    filled = 0
    for tensor in members:
        taken = 0
        while taken < tensor.num_elements:
            length = min(tensor.num_elements - taken, size - filled)
            segments.append(Segment(tensor=tensor.name, tensor_start=taken, fragment_start=filled, length=length))
            taken += length
            filled += length
            remaining -= length
            if filled == size or remaining == 0:
                yield Fragment(
                    index=index,
                    role=tensor.role,
                    dtype=tensor.dtype,
                    num_elements=filled,
                    segments=tuple(segments),
                )
                index += 1
                segments, filled = [], 0
