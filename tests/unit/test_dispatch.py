"""Which push goes over which stream: the shortest queue first, and a fragment's answers never overtake each other."""

import random

from paceline.dispatch import Dispatch, PushKey

BYTES = 1000


def opened(num_streams: int) -> Dispatch:
    """A dispatch with so many open streams."""
    dispatch = Dispatch()
    dispatch.num_streams = num_streams
    for stream in range(num_streams):
        dispatch.begin_stream(stream)
        dispatch.opened(stream)
    return dispatch


def test_the_stream_with_the_fewest_bytes_under_way_takes_first() -> None:
    """A stream that still has bytes under way waits until none has fewer."""
    dispatch = opened(2)
    for fragment in range(4):
        dispatch.add(PushKey(fragment, 1), BYTES)
    assert dispatch.take(0) == PushKey(0, 1)
    assert dispatch.take(0) is None
    assert dispatch.take(1) == PushKey(1, 1)
    dispatch.arrived(0, BYTES)
    assert dispatch.take(1) is None
    assert dispatch.take(0) == PushKey(2, 1)


def test_among_equals_the_stream_with_the_fewest_answers_to_come_takes_first() -> None:
    """Where pushes are small and updates large, these are what is to be shared out."""
    dispatch = opened(2)
    for fragment in range(3):
        dispatch.add(PushKey(fragment, 1), BYTES)
    assert dispatch.take(0) == PushKey(0, 1)
    dispatch.arrived(0, BYTES)
    assert dispatch.take(0) is None
    assert dispatch.take(1) == PushKey(1, 1)
    assert dispatch.take(0) == PushKey(2, 1)


def test_a_fragment_stays_while_a_push_of_it_is_unanswered() -> None:
    """Answers of one fragment come on one stream, in order, also where a worker has several rounds in flight."""
    dispatch = opened(2)
    dispatch.add(PushKey(0, 1), BYTES)
    assert dispatch.take(1) == PushKey(0, 1)
    dispatch.arrived(1, BYTES)
    dispatch.add(PushKey(0, 2), BYTES)
    assert dispatch.take(0) is None
    assert dispatch.take(1) == PushKey(0, 2)
    dispatch.answered(PushKey(0, 1))
    dispatch.answered(PushKey(0, 2))
    dispatch.add(PushKey(0, 3), BYTES)
    assert dispatch.take(0) == PushKey(0, 3)


def test_a_later_push_does_not_overtake_one_that_waits() -> None:
    """The shard refuses a seq that is not the next."""
    dispatch = opened(2)
    dispatch.add(PushKey(0, 1), BYTES)
    assert dispatch.take(0) == PushKey(0, 1)
    for key in (PushKey(0, 2), PushKey(0, 3), PushKey(1, 1)):
        dispatch.add(key, BYTES)
    assert dispatch.take(1) == PushKey(1, 1)
    assert [dispatch.take(0), dispatch.take(0)] == [PushKey(0, 2), PushKey(0, 3)]


def test_after_a_cut_the_same_index_sends_again_and_keeps_the_fragment() -> None:
    """What was sent twice may be answered twice: until the next stream of the index is there, the fragment stays."""
    dispatch = opened(2)
    for seq in (1, 2):
        dispatch.add(PushKey(0, seq), BYTES)
        assert dispatch.take(1) == PushKey(0, seq)
    dispatch.end_stream(1)
    assert dispatch.take(0) is None
    dispatch.begin_stream(1)
    assert [dispatch.take(1), dispatch.take(1), dispatch.take(1)] == [PushKey(0, 1), PushKey(0, 2), None]
    for seq in (1, 2):
        dispatch.answered(PushKey(0, seq))
    dispatch.num_streams = 1
    assert not dispatch.is_done(1)
    dispatch.num_streams = 2
    dispatch.add(PushKey(0, 3), BYTES)
    assert dispatch.take(0) is None
    dispatch.opened(1)
    assert dispatch.take(0) is None
    dispatch.end_stream(1)
    dispatch.begin_stream(1)
    assert dispatch.take(0) is None
    dispatch.opened(1)
    assert dispatch.take(0) == PushKey(0, 3)


def test_a_cut_stream_does_not_hold_up_the_others() -> None:
    """What is under way on a stream that is gone counts for nothing."""
    dispatch = opened(2)
    for fragment in range(2):
        dispatch.add(PushKey(fragment, 1), BYTES)
    assert dispatch.take(0) == PushKey(0, 1)
    dispatch.end_stream(1)
    assert dispatch.take(0) == PushKey(1, 1)


def test_a_stream_that_takes_no_new_pushes_ends_with_its_last_answer() -> None:
    """Fewer connections lose nothing that is under way."""
    dispatch = opened(2)
    for fragment in range(2):
        dispatch.add(PushKey(fragment, 1), BYTES)
    assert dispatch.take(0) is not None
    assert dispatch.take(1) == PushKey(1, 1)
    dispatch.num_streams = 1
    assert not dispatch.is_done(1)
    dispatch.add(PushKey(2, 1), BYTES)
    dispatch.arrived(1, BYTES)
    assert dispatch.take(1) is None
    dispatch.answered(PushKey(1, 1))
    assert dispatch.is_done(1)
    assert not dispatch.is_done(0)


def test_whatever_happens_every_push_is_sent_and_fragments_keep_their_order() -> None:
    """Random cuts, answers and changes of the number of streams: seqs of a fragment are sent in order on one stream."""
    generator = random.Random(5)
    dispatch = opened(3)
    open_streams = {0, 1, 2}
    sent: dict[PushKey, int] = {}
    for step in range(3000):
        stream = generator.randrange(3)
        if step < 2500 and generator.random() < 0.3:
            fragment = generator.randrange(6)
            seq = 1 + max((key.seq for key in sent if key.fragment == fragment), default=0)
            if PushKey(fragment, seq) not in dispatch._num_bytes:
                dispatch.add(PushKey(fragment, seq), BYTES)
        if stream in open_streams and generator.random() < 0.05:
            dispatch.end_stream(stream)
            open_streams.discard(stream)
        elif stream not in open_streams:
            dispatch.begin_stream(stream)
            dispatch.opened(stream)
            open_streams.add(stream)
        key = dispatch.take(stream) if stream in open_streams else None
        if key is not None:
            unanswered = [each for each in sent if each.fragment == key.fragment and each in dispatch._num_bytes]
            assert all(sent[each] == stream for each in unanswered)
            assert all(each.seq <= key.seq for each in sent if each.fragment == key.fragment) or key in sent
            sent[key] = stream
        for each in list(dispatch._num_bytes):
            if each in sent and generator.random() < 0.2:
                dispatch.answered(each)
    assert len(sent) > 300
    assert not dispatch.is_waiting
