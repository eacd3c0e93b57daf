"""Bounds of what is sent that both sides need before they know of tensors. Imports no torch."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""The largest message either side accepts; a guard, since honest messages stay near a MiB."""
