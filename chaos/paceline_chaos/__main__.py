"""Runs the command as `python -m paceline_chaos`, with the exit codes of `paceline`."""

import sys

import click

from paceline.cli import EntryPointGroup
from paceline_chaos.command import chaos


class _ChaosAlone(EntryPointGroup):
    """The group of all commands, with this one in it, whether or not it is installed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(chaos.name)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return chaos


if __name__ == "__main__":
    _ChaosAlone(name="paceline")([str(chaos.name), *sys.argv[1:]], prog_name="paceline")
