"""Run the command as `python -m paceline_chaos`."""

from paceline_chaos.command import main

main()
