"""Shards that are started one by one: what their configuration may say, and what clients are told of them."""

from typing import Any

import pytest

from paceline_server.config import ServerConfig
from paceline_server.settings import config_from_mapping, load_config
from paceline_server.shard_process import shard_addresses
from paceline_server.storage.store import kept_config
from paceline_wire.errors import ConfigurationError

THREE = ["shard-0.example.org:7070", "shard-1.example.org:7071", "[2001:db8::1]:7070"]


def separate(**changes: Any) -> ServerConfig:
    """Shard 1 of three, but for the changes."""
    return config_from_mapping({"shard_addresses": THREE, "shard_index": 1, **changes})


def test_their_number_is_that_of_the_addresses() -> None:
    """The number of shards need not be said, and one of them is served here, on the port to listen on itself."""
    config = separate()
    assert (config.shards, config.shard_indexes, config.port_of(1)) == (3, (1,), 7070)
    assert separate(shards=3) == config


def test_shards_on_one_host_take_ports_in_a_row() -> None:
    """Without addresses all shards are served here, and port 0 stays any free one."""
    config = config_from_mapping({"shards": 3, "listen": "127.0.0.1:9000"})
    assert [config.port_of(index) for index in config.shard_indexes] == [9000, 9001, 9002]
    assert config_from_mapping({"shards": 2, "listen": "127.0.0.1:0"}).port_of(1) == 0


def test_the_environment_says_it() -> None:
    """Orchestrators set variables: the addresses with commas, the index as text."""
    variables = {"PACELINE_SHARD_ADDRESSES": "a:7070, b:7070", "PACELINE_SHARD_INDEX": "1"}
    config = load_config(None, variables, {})
    assert (config.shard_addresses, config.shard_index, config.shards) == (("a:7070", "b:7070"), 1, 2)


def test_clients_are_told_all_of_them() -> None:
    """Whatever port is listened on here, clients hear where every shard is reached; IPv6 goes in brackets."""
    told = [f"{shard.host}:{shard.port}" for shard in shard_addresses(separate(listen="127.0.0.1:9"), [9])]
    assert told == THREE


def test_an_advertised_ipv6_host_goes_in_brackets() -> None:
    """What clients are told is what they can dial."""
    config = config_from_mapping({"advertise_host": "2001:db8::1"})
    assert [shard.host for shard in shard_addresses(config, [7070])] == ["[2001:db8::1]"]


def test_where_shards_are_is_no_part_of_the_run() -> None:
    """A shard may move to another host and go on with its data: the data says nothing of addresses."""
    assert kept_config(separate()) == kept_config(config_from_mapping({"shards": 3}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shard_addresses": []}, "shard_index = 1 (given mapping): needs shard_addresses"),
        ({"shard_index": None}, "is needed with shard_addresses: which of the 3 this one is"),
        ({"shard_index": 3}, "shard_index = 3 (given mapping): should be less than 3"),
        ({"shard_index": -1}, "should be greater than or equal to 0"),
        ({"shards": 2}, "shards = 2 (given mapping): should be left out, or 3"),
        ({"advertise_host": "example.org"}, "should be left out: shard_addresses name the hosts"),
        ({"shard_addresses": ["a:7070", "b"]}, "should be host:port"),
        ({"shard_addresses": ["a:0", "b:7070"]}, "should name the ports that clients reach, not the 0 of 'a:0'"),
        ({"shard_addresses": ["a:7070", "a:7070"]}, "should name each shard once, not 'a:7070' twice"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Each sentence names the field and what it should be."""
    with pytest.raises(ConfigurationError) as refused:
        separate(**changes)
    assert reason in str(refused.value)
    assert "problems" not in str(refused.value), "one mistake is told once"
