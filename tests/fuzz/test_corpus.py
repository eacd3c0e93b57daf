"""Every input that is kept for the fuzzers is played again: none crashes, hangs, or breaks what must hold."""

import pytest

from fuzz.catalogue import TARGETS
from fuzz.engine import corpus_of, played


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_of_the_corpus_does_what_none_may(name: str) -> None:
    """The target's errors and outcomes are all that comes of the seeds and of what led somewhere new."""
    target = TARGETS[name]()
    inputs = [*target.seeds(), *corpus_of(name)]
    assert inputs
    try:
        for data in inputs:
            outcome, allowed = played(target, data)
            assert allowed, f"{outcome}\n{data.hex()}"
    finally:
        target.finish()
