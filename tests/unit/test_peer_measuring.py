"""What the benchmarks beside other systems make of what their workers recorded, without running any."""

import pytest

import growth
from peer_systems.measuring import Load, summary
from peer_systems.places import Place, Seat
from peer_systems.tables import between


def record(began_s: float, ended_s: float, moved: int, inner_s: float = 0.0) -> dict[str, float]:
    """What a worker notes of one exchange."""
    return {"began_s": began_s, "ended_s": ended_s, "sent": moved, "received": moved, "cpu_s": 0.0, "inner_s": inner_s}


def place(counts: str) -> Place:
    """Two workers whose bytes are counted like this."""
    return Place(name="loopback", workers=(Seat(), Seat()), counts=counts)


EXCHANGES = (
    [record(0.0, 1.0, 1_000_000), record(2.0, 3.0, 3_000_000, 1.0)],
    [record(0.0, 1.0, 1_000_000), record(2.5, 3.5, 5_000_000, 1.5)],
)


def test_step_lasts_from_last_begin_to_last_end() -> None:
    """An outer step lasts from when the last worker begins to when the last has its model; warm-up does not count."""
    found = summary(place("both"), Load(parameters=1, warm_up=1, rounds=1), EXCHANGES)
    assert found["step_s"] == [1.0]


@pytest.mark.parametrize(("counts", "megabytes"), [("one", 2.0), ("sent", 6.0), ("both", 12.0)])
def test_each_byte_on_the_wire_counts_once(counts: str, megabytes: float) -> None:
    """A shared interface counts once, direct links by what is sent, links to a coordinator both ways."""
    found = summary(place(counts), Load(parameters=1, warm_up=1, rounds=1), EXCHANGES)
    assert found["wire_mb"] == pytest.approx(megabytes)


def test_utilization_is_inner_time_over_wall_time() -> None:
    """Utilization is the workers' mean of time in inner steps over the time since the warm-up's last exchange."""
    load = Load(parameters=1, warm_up=1, rounds=1, inner_steps=10, step_s=0.1)
    found = summary(place("both"), load, EXCHANGES)
    assert found["utilization"] == pytest.approx((1.0 / 2.0 + 1.5 / 2.5) / 2)
    assert found["utilization_stated"] == pytest.approx((1.0 / 2.0 + 1.0 / 2.5) / 2)


def test_table_replaces_what_is_between_its_markers() -> None:
    """A page keeps all but what is between the markers; a page without them is refused."""
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n"
    assert between(page, "a", "new\n") == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="0 places for 'b'"):
        between(page, "b", "new\n")


def test_exponent_of_linear_cost_is_one() -> None:
    """A cost that doubles with its cause has exponent 1, one that quadruples 2."""
    points = [{"workers": count, "linear": 3.0 * count, "square": 0.1 * count**2} for count in (1, 2, 8)]
    assert growth.exponents(points, "workers", "linear") == pytest.approx([1.0, 1.0])
    assert growth.upper_half(points, "workers", "square") == pytest.approx(2.0)
