"""What is kept of an earlier version: its messages as they were, and what its client and server said to each other.

`record.py` made it. A peer that speaks only these messages knows nothing of fields that were added since.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FOLDER = Path(__file__).with_name("earlier")
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir()))
PACKAGE = "paceline_wire.v1"
SERVICE = f"{PACKAGE}.ParameterServerService"


@dataclass(frozen=True)
class Call:
    """One call of the old client's.

    Attributes:
        method: Its name.
        messages: What went "up" and "down", in order.
    """

    method: str
    messages: Sequence[tuple[str, bytes]]


class EarlierVersion:
    """One of them, by name."""

    def __init__(self, name: str) -> None:
        self.folder = FOLDER / name
        self._pool = descriptor_pool.DescriptorPool()
        described = descriptor_pb2.FileDescriptorSet.FromString((self.folder / "descriptors.binpb").read_bytes())
        for file in described.file:
            self._pool.AddSerializedFile(file.SerializeToString())

    def message(self, name: str) -> Any:
        """The class of a message as it was."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

    def types_of(self, method: str) -> tuple[Any, Any]:
        """The classes of a method's requests and answers."""
        found = self._pool.FindServiceByName(SERVICE).methods_by_name[method]
        return self.message(found.input_type.name), self.message(found.output_type.name)

    @cached_property
    def calls(self) -> list[Call]:
        """What the old client and the old server said, but for heartbeats."""
        calls = json.loads((self.folder / "conversation.json").read_text())
        return [
            Call(call["method"], [(way, base64.b64decode(data)) for way, data in call["messages"]]) for call in calls
        ]

    @property
    def flags(self) -> list[str]:
        """The flags that the old server was started with."""
        flags: list[str] = json.loads((self.folder / "about.json").read_text())["flags"]
        return flags

    @property
    def configuration(self) -> dict[str, Any]:
        """The configuration that the old server had."""
        configuration: dict[str, Any] = {}
        for flag, value in zip(self.flags[::2], self.flags[1::2], strict=True):
            section, _, name = flag.removeprefix("--").replace("-", "_").partition(".")
            configuration.setdefault(section, {})[name] = value
        return configuration

    def updates(self) -> dict[tuple[int, int], Any]:
        """The old server's answers to pushes, by fragment and number."""
        (exchange,) = (call for call in self.calls if call.method == "Exchange")
        answers = [
            self.message("ExchangeResponse").FromString(data) for way, data in exchange.messages if way == "down"
        ]
        return {(each.update.fragment, each.update.seq): each for each in answers if each.HasField("update")}


def is_report(answer: Any) -> bool:
    """Whether an answer only tells how much has arrived, which depends on the moment."""
    return "received_bytes" in answer.DESCRIPTOR.fields_by_name and answer.HasField("received_bytes")
