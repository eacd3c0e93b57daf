"""What both sides must agree on byte for byte: messages, codecs, manifest and errors; nothing knows of sockets."""

PROTOCOL_VERSION = 1
"""Version of the exchange protocol. Peers of different versions refuse each other with a sentence."""

__all__ = ["PROTOCOL_VERSION"]
