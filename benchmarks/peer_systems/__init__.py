"""Systems that exchange models between workers, each run the same way: Paceline and those that people use instead.

Every module but `setting`, `training` and `process` is one system, with up to two functions: `coordinate(setting)`
serves until it is ended, and says when it is ready; `work(setting, training)` makes all rounds of one worker. Each runs
in a process of its own (`process`), with the interpreter of the environment that has the system. Nothing here imports
another system, so each environment needs torch and its own system alone.
"""
