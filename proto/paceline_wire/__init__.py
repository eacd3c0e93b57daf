"""What both sides must agree on byte for byte: messages, codecs, manifest and errors; nothing knows of sockets."""

PROTOCOL_VERSION = 1
"""Version of the exchange protocol that this package speaks; a client speaks no other."""

OLDEST_PROTOCOL_VERSION = 1
"""The oldest version whose clients a server still serves: the one before, while a run is upgraded shard by shard."""

__all__ = ["OLDEST_PROTOCOL_VERSION", "PROTOCOL_VERSION"]
