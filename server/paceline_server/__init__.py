"""A shard of a Paceline run: keeps parameters and their ordered momentum, and answers workers' pushes."""

from paceline_server.processes import local

__all__ = ["local"]
