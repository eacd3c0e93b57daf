"""The configuration: what is accepted, from where, and what is said about everything else."""

import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from paceline_server.config import BLOCK_ELEMENTS, ServerConfig
from paceline_server.config_fields import config_fields, nearest_name
from paceline_server.config_outer import OUTER_RULES
from paceline_server.options import server_config_options
from paceline_server.reference import configuration_reference
from paceline_server.settings import OTHER_VARIABLES, config_from_mapping, config_to_mapping, load_config
from paceline_wire.codecs.base import BLOCK_ELEMENTS as CODEC_BLOCK_ELEMENTS
from paceline_wire.errors import ConfigurationError

SECRET = "correct-horse-battery"
REPOSITORY = Path(__file__).parents[2]


def refusal(build: Callable[[], object]) -> str:
    """Return the message of the ConfigurationError that a call raises."""
    with pytest.raises(ConfigurationError) as raised:
        build()
    return str(raised.value)


@pytest.fixture
def tls_files(tmp_path: Path) -> dict[str, str]:
    """Paths of three readable files, by the name of their field."""
    files = {name: tmp_path / f"{name}.pem" for name in ("tls_cert", "tls_key", "client_ca")}
    for file in files.values():
        file.write_text("pem")
    return {name: str(file) for name, file in files.items()}


@click.command()
@server_config_options
@click.option("--json", "as_json", is_flag=True)
def serve(config: ServerConfig, as_json: bool) -> None:
    """Print the configuration."""
    click.echo(repr(config) if as_json else f"{config.outer.lr} {config.exchange.inner_steps}")


def run(*arguments: str, **environ: str) -> str:
    """Run the command and return what it printed."""
    result = CliRunner().invoke(serve, arguments, env=environ, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class TestModel:
    """What the model accepts and resolves."""

    def test_defaults(self) -> None:
        """Nothing needs to be configured, and the defaults are the documented ones."""
        config = config_from_mapping({})
        assert ServerConfig() == config
        assert (config.host, config.port, config.shards, config.advertise_host) == ("127.0.0.1", 7070, 1, "")
        assert (config.outer.rule, config.outer.lr, config.outer.momentum) == ("ormo", 0.7, 0.5)
        assert tuple(config.schedule.model_dump().values()) == ("async", None, None, 30.0)
        assert tuple(config.exchange.model_dump().values()) == (
            "int4",
            "bf16",
            4_194_304,
            50,
            True,
            "1",
            1,
            "auto",
            None,
            False,
            512,
            4096,
        )
        assert config.security.accepted_tokens() == ()

    def test_frozen(self) -> None:
        """A configuration cannot change once it is built."""
        with pytest.raises(ValidationError):
            ServerConfig().outer.lr = 1.0

    @pytest.mark.parametrize(
        ("listen", "host", "port"),
        [
            ("192.0.2.1:0", "192.0.2.1", 0),
            ("[::1]:7070", "::1", 7070),
            ("ps.example.org:65535", "ps.example.org", 65535),
        ],
    )
    def test_address(self, listen: str, host: str, port: int) -> None:
        """An address is split into host and port, IPv6 without its brackets."""
        config = config_from_mapping({"listen": listen})
        assert (host, port) == (config.host, config.port)

    @pytest.mark.parametrize(
        ("kind", "publish", "look_ahead"),
        [
            ("async", None, False),
            ("quorum", None, True),
            ("barrier", None, True),
            ("async", "look-ahead", True),
            ("barrier", "polyak", False),
        ],
    )
    def test_look_ahead(self, kind: str, publish: str | None, look_ahead: bool) -> None:
        """What is published follows the schedule unless it is said."""
        schedule = {"kind": kind} | ({"quorum": 2} if kind == "quorum" else {})
        config = config_from_mapping({"schedule": schedule, "outer": {"publish": publish} if publish else {}})
        assert look_ahead is config.look_ahead

    def test_sgd_has_no_momentum(self) -> None:
        """The rule sgd is ormo with momentum 0, without saying so."""
        assert config_from_mapping({"outer": {"rule": "sgd"}}).outer.momentum == 0.0

    def test_own_weight_as_a_number(self) -> None:
        """The integer 1 of TOML is a valid own weight."""
        assert config_from_mapping({"exchange": {"own_weight": 1}}).exchange.own_weight == "1"

    def test_block_elements(self) -> None:
        """Fragments are cut at the codecs' blocks."""
        assert CODEC_BLOCK_ELEMENTS == BLOCK_ELEMENTS

    def test_every_field_is_described(self) -> None:
        """No flag is without help."""
        assert [path for path, field in config_fields().items() if not field.description] == []


class TestRefusals:
    """Every value that is refused, and the sentence about it."""

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("listen", "7070", "should be host:port, such as 127.0.0.1:7070 or [::1]:7070"),
            ("listen", ":7070", "should be host:port"),
            ("listen", "::1:7070", "should be host:port"),
            ("listen", "[::zz]:7070", "should be host:port"),
            ("listen", "localhost:65536", "with a port from 0 to 65535"),
            ("shards", 0, "should be greater than or equal to 1"),
            ("shards", True, "should not be true or false"),
            ("shards", 58467, "there are 58466 from 7070 on"),
            ("advertise_host", "ps.example.org:7070", "should be a host name or an IP address, without a port"),
            ("outer.rule", "adam", f"the valid ones are {', '.join(OUTER_RULES)}"),
            ("outer.lr", 0, "should be greater than 0"),
            ("outer.lr", float("inf"), "should be a finite number"),
            ("outer.lr", "fast", "should be a valid number"),
            ("outer.lr", True, "should not be true or false"),
            ("outer.momentum", 1.0, "should be less than 1"),
            ("outer.momentum", -0.1, "should be greater than or equal to 0"),
            ("outer.momentum", float("nan"), "should be"),
            ("outer.publish", "nesterov", "should be 'polyak' or 'look-ahead'"),
            ("schedule.kind", "sync", "should be 'async', 'participation', 'quorum' or 'barrier'"),
            ("schedule.quota", 0, "should be greater than or equal to 1"),
            ("schedule.quota", 1.5, "should be a valid integer"),
            ("schedule.quorum", 2, "has a meaning only with schedule.kind = 'quorum', which is 'async'"),
            ("schedule.lease_s", 0, "should be greater than 0"),
            ("schedule.lease_s", 1e9, "should be less than or equal to 604800"),
            ("exchange.uplink", "gzip", "should be 'fp32', 'bf16', 'int8', 'int4', 'fp4' or 'topk'"),
            ("exchange.downlink", "fp4", "should be 'fp32', 'bf16', 'int8' or 'int4'"),
            ("exchange.fragment_elements", 1000, "should be a multiple of 256"),
            ("exchange.fragment_elements", 0, "should be greater than or equal to 256"),
            ("exchange.fragment_elements", 1 << 25, "should be less than or equal to 16777216"),
            ("exchange.inner_steps", 0, "should be greater than or equal to 1"),
            ("exchange.dynamic_inner_steps", "perhaps", "should be a valid boolean"),
            ("exchange.own_weight", 2, "should be '1/M', '1', 'local' or 'predicted'"),
            ("exchange.window", 9, "should be less than or equal to 8"),
            ("storage.mirror", "file:///tmp/mirror", "needs storage.data_dir"),
            ("storage.sync", "always", "should be 'commit', 'interval' or 'never'"),
            ("security.tls_cert", "missing.pem", "cannot be read: No such file or directory"),
            ("security.token_file", "missing.txt", "cannot be read: No such file or directory"),
        ],
    )
    def test_value(self, path: str, value: object, reason: str) -> None:
        """A wrong value is named with its field, its source and what is allowed."""
        section, _, name = path.rpartition(".")
        message = refusal(lambda: config_from_mapping({section: {name: value}} if section else {name: value}))
        assert message.startswith(f"{path} = {value!r} (given mapping): ")
        assert reason in message

    @pytest.mark.parametrize(
        ("mapping", "reason"),
        [
            ({"schedule": {"kind": "quorum"}}, "schedule.quorum: is needed with schedule.kind = 'quorum'."),
            (
                {"schedule": {"kind": "quorum", "quota": 2, "quorum": 3}},
                "schedule.quorum = 3 (given mapping): should not be larger than schedule.quota, which is 2.",
            ),
            ({"outer": {"rule": "sgd", "momentum": 0.5}}, "the rule sgd has no momentum"),
            ({"outer": 3}, "'outer' should be a table of keys."),
        ],
    )
    def test_relation(self, mapping: dict[str, object], reason: str) -> None:
        """Values that do not fit together are refused at the later one."""
        assert reason in refusal(lambda: config_from_mapping(mapping))

    def test_everything_is_listed(self) -> None:
        """All problems of all kinds are told at once."""
        mapping = {"sharts": 2, "outer": {"lr": -1, "momentum": 2}, "schedule": {"kind": "quorum"}}
        message = refusal(lambda: config_from_mapping(mapping))
        assert message.startswith("The configuration has 4 problems:\n  - ")
        for name in ("'shards'", "outer.lr", "outer.momentum", "schedule.quorum"):
            assert name in message


class TestSecurity:
    """TLS files and tokens."""

    def test_tls(self, tls_files: dict[str, str]) -> None:
        """Certificate, key and client authorities are accepted together."""
        config = config_from_mapping({"security": tls_files})
        assert Path(tls_files["client_ca"]) == config.security.client_ca

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (("tls_cert",), "security.tls_cert and security.tls_key are needed together"),
            (("tls_key",), "security.tls_cert and security.tls_key are needed together"),
            (("client_ca",), "needs security.tls_cert"),
        ],
    )
    def test_incomplete_tls(self, tls_files: dict[str, str], given: tuple[str, ...], reason: str) -> None:
        """Half of a TLS configuration is refused rather than ignored."""
        message = refusal(lambda: config_from_mapping({"security": {name: tls_files[name] for name in given}}))
        assert reason in message

    def test_directory_as_certificate(self, tls_files: dict[str, str], tmp_path: Path) -> None:
        """What is there but cannot be read is refused at start."""
        message = refusal(lambda: config_from_mapping({"security": tls_files | {"tls_cert": str(tmp_path)}}))
        assert "cannot be read: Is a directory" in message

    def test_tokens_are_merged(self, tmp_path: Path) -> None:
        """Tokens given and tokens of the file are all accepted, each once."""
        file = tmp_path / "tokens"
        file.write_text("# workers\nb\n\n  c#1  \na\n")
        config = config_from_mapping({"security": {"tokens": ["a"], "token_file": str(file)}})
        assert config.security.accepted_tokens() == ("a", "b", "c#1")

    def test_token_file_that_vanishes(self, tmp_path: Path) -> None:
        """A token file that can no longer be read is an error, not an open server."""
        file = tmp_path / "tokens"
        file.write_text("a")
        security = config_from_mapping({"security": {"token_file": str(file)}}).security
        file.unlink()
        assert "cannot be read" in refusal(security.accepted_tokens)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"# nobody\n\n", "holds no token"),
            (f"a\n{SECRET} {SECRET}\n".encode(), "line 2 should be printable ASCII without spaces"),
            (SECRET.encode() + b"\xff", "line 1 should be printable ASCII"),
        ],
    )
    def test_token_file_is_refused(self, tmp_path: Path, content: bytes, reason: str) -> None:
        """A token file without tokens, or with something else, is refused without showing it."""
        file = tmp_path / "tokens"
        file.write_bytes(content)
        message = refusal(lambda: config_from_mapping({"security": {"token_file": str(file)}}))
        assert reason in message
        assert SECRET not in message

    @pytest.mark.parametrize("tokens", [[f"{SECRET} "], ["a", ""], [f"{SECRET}é"], SECRET, [3], {SECRET: 1}])
    def test_tokens_are_refused(self, tokens: object) -> None:
        """A wrong token is refused without showing it."""
        message = refusal(lambda: config_from_mapping({"security": {"tokens": tokens}}))
        assert message.startswith("security.tokens")
        assert SECRET not in message

    def test_secrets_are_not_shown(self) -> None:
        """Tokens appear in no repr, dump or validation error."""
        config = config_from_mapping({"security": {"tokens": [SECRET]}})
        with pytest.raises(ValidationError) as raised:
            ServerConfig.model_validate({"security": {"tokens": [f"{SECRET} "]}})
        for text in (repr(config), str(config), config.model_dump_json(), str(config.model_dump()), str(raised.value)):
            assert SECRET not in text

    def test_other_processes(self, tls_files: dict[str, str]) -> None:
        """A configuration reaches another process whole, as a mapping or a pickle."""
        mapping = {"outer": {"rule": "sgd"}, "security": {**tls_files, "tokens": [SECRET]}}
        config = config_from_mapping(mapping)
        assert config == config_from_mapping(config_to_mapping(config))
        assert config == pickle.loads(pickle.dumps(config))  # noqa: S301  # our own bytes


class TestSources:
    """File, environment and flags."""

    def test_precedence(self, tmp_path: Path) -> None:
        """Flags override the environment, and the environment the file, field by field."""
        file = tmp_path / "run.toml"
        file.write_text("shards = 2\n[outer]\nlr = 0.1\nmomentum = 0.1\n[exchange]\nwindow = 2\n")
        environ = {"PACELINE_OUTER__LR": "0.2", "PACELINE_OUTER__MOMENTUM": "0.2", "HOME": "elsewhere"}
        config = load_config(file, environ, {"outer.lr": "0.3", "exchange.window": None})
        assert (config.shards, config.outer.lr, config.outer.momentum, config.exchange.window) == (2, 0.3, 0.2, 2)

    def test_overridden_values_do_not_count(self) -> None:
        """A wrong value that a flag overrides is no error."""
        assert load_config(None, {"PACELINE_SHARDS": "none"}, {"shards": 3}).shards == 3

    @pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False), ("0", False), ("ON", True)])
    def test_booleans_as_text(self, text: str, value: bool) -> None:
        """A variable says yes or no in the usual words."""
        environ = {"PACELINE_EXCHANGE__DYNAMIC_INNER_STEPS": text}
        assert value is load_config(None, environ, {}).exchange.dynamic_inner_steps

    def test_lists_as_text(self) -> None:
        """A list is separated by commas in a variable."""
        config = load_config(None, {"PACELINE_SECURITY__TOKENS": "a, b"}, {})
        assert config.security.accepted_tokens() == ("a", "b")

    def test_empty_variable(self) -> None:
        """An empty variable counts as not set."""
        assert ServerConfig() == load_config(None, {"PACELINE_OUTER__LR": "", "PACELINE_ELSE": ""}, {})

    def test_variables_of_others(self) -> None:
        """Variables of other commands, and those that Kubernetes sets, are left alone."""
        kubernetes = {
            "PACELINE_SERVICE_HOST": "10.0.0.1",
            "PACELINE_SERVICE_PORT_GRPC": "7070",
            "PACELINE_SHARDS_PORT": "tcp://10.0.0.1:7070",
            "PACELINE_PORT_7070_TCP_ADDR": "10.0.0.1",
        }
        assert ServerConfig() == load_config(None, kubernetes | dict.fromkeys(OTHER_VARIABLES, "x"), {})

    def test_unknown_names(self, tmp_path: Path) -> None:
        """An unknown name is told with its source and the nearest valid name, in the source's own spelling."""
        file = tmp_path / "run.toml"
        file.write_text("[outer]\nmomentm = 0.9\n[shedule]\nkind = 'async'\n")
        message = refusal(lambda: load_config(file, {"PACELINE_OUTER_LR": "1", "PACELINE_PORT": "7"}, {"outr.lr": 1}))
        assert f"file {file}: the key 'outer.momentm' does not exist; did you mean 'outer.momentum'?" in message
        assert f"file {file}: the key 'shedule' does not exist; did you mean 'schedule'?" in message
        assert "The variable PACELINE_OUTER_LR does not exist; did you mean 'PACELINE_OUTER__LR'?" in message
        assert "The variable PACELINE_PORT does not exist" in message
        assert "The flag --outr.lr does not exist; did you mean '--outer.lr'?" in message

    @pytest.mark.parametrize(
        ("unknown", "nearest"),
        [
            ("outer.quota", "schedule.quota"),
            ("momentum", "outer.momentum"),
            ("outer.lrr", "outer.lr"),
            ("inner_step", "exchange.inner_steps"),
            ("zzz", None),
        ],
    )
    def test_nearest_name(self, unknown: str, nearest: str | None) -> None:
        """The nearest name looks into all tables, and is none rather than a far one."""
        assert nearest == nearest_name(unknown, config_fields())

    def test_wrong_values_name_their_source(self, tmp_path: Path) -> None:
        """A wrong value is told with the file, variable or flag that gave it."""
        file = tmp_path / "run.toml"
        file.write_text("shards = 0\n")
        environ = {"PACELINE_OUTER__LR": "-1", "PACELINE_SECURITY__TOKENS": f"{SECRET} {SECRET}"}
        message = refusal(lambda: load_config(file, environ, {"exchange.inner-steps": "few"}))
        assert f"shards = 0 (file {file}): should be greater than or equal to 1." in message
        assert "outer.lr = '-1' (variable PACELINE_OUTER__LR): should be greater than 0." in message
        assert "exchange.inner_steps = 'few' (flag --exchange.inner-steps): should be a valid integer" in message
        assert "security.tokens (variable PACELINE_SECURITY__TOKENS): " in message
        assert SECRET not in message

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(None, "cannot be read: No such file"), (b"shards = ", "is not valid TOML"), (b"\xff", "is not valid TOML")],
    )
    def test_file_is_refused(self, tmp_path: Path, content: bytes | None, reason: str) -> None:
        """A file that is missing or not TOML is named."""
        file = tmp_path / "run.toml"
        if content is not None:
            file.write_bytes(content)
        message = refusal(lambda: load_config(file, {}, {}))
        assert f"The configuration file {file} {reason}" in message


class TestOptions:
    """The fields as options of a command."""

    def test_every_field_is_an_option(self) -> None:
        """The help shows every flag with its meaning, in one spelling."""
        text = run("--help")
        for field in config_fields().values():
            assert field.flag in text
        assert "Optimizer steps of the fastest worker" in text
        assert "[default: 50]" in text
        assert "[fp32|bf16|int8|int4|fp4|topk]" in text
        assert "inner_steps" not in text

    @pytest.mark.parametrize("flag", ["--exchange.inner-steps", "--exchange.inner_steps"])
    def test_spellings(self, flag: str) -> None:
        """A flag is accepted with hyphens and with underscores."""
        assert run(flag, "7") == "0.7 7\n"

    def test_sources(self, tmp_path: Path) -> None:
        """A command reads its file from the flag or the variable, then the environment, then the flags."""
        file = tmp_path / "run.toml"
        file.write_text("outer.lr = 0.1\nexchange.inner_steps = 1\n")
        assert run("--config", str(file)) == "0.1 1\n"
        assert run(PACELINE_CONFIG=str(file), PACELINE_OUTER__LR="0.2") == "0.2 1\n"
        assert run("--outer.lr=0.3", PACELINE_CONFIG=str(file), PACELINE_OUTER__LR="0.2") == "0.3 1\n"

    @pytest.mark.parametrize("switch", ["--no-exchange.dynamic-inner-steps", "--no-exchange.dynamic_inner_steps"])
    def test_switches(self, switch: str) -> None:
        """A boolean is switched on and off by flags, in both spellings, and left alone without."""
        environ = {"PACELINE_EXCHANGE__DYNAMIC_INNER_STEPS": "false"}
        assert "dynamic_inner_steps=False" in run("--json", switch)
        assert "dynamic_inner_steps=False" in run("--json", **environ)
        assert "dynamic_inner_steps=True" in run("--json", "--exchange.dynamic-inner-steps", **environ)

    def test_short_flags(self, tls_files: dict[str, str]) -> None:
        """The TLS files have short flags."""
        assert tls_files["tls_key"] in run(
            "--json", "--tls-cert", tls_files["tls_cert"], "--tls-key", tls_files["tls_key"]
        )

    def test_unknown_option(self) -> None:
        """An unknown flag is refused with the nearest ones."""
        result = CliRunner().invoke(serve, ["--outer.momentm", "1"])
        assert result.exit_code == 2
        assert "--outer.momentum" in result.output

    def test_wrong_value(self) -> None:
        """A wrong value of a flag is judged like one of a file."""
        result = CliRunner().invoke(serve, ["--shards", "none"])
        assert isinstance(result.exception, ConfigurationError)
        assert str(result.exception).startswith("shards = 'none' (flag --shards): ")


class TestReference:
    """docs/configuration.md."""

    def test_page_is_current(self) -> None:
        """The page is what the model says now: `python -m paceline_server.reference > docs/configuration.md`."""
        assert (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_reference()

    def test_page_lists_every_field(self) -> None:
        """The page has each field's key, flag and variable."""
        page = configuration_reference()
        for field in config_fields().values():
            assert f"| `{field.path}` | `{field.flag}`" in page
            assert f"| `{field.variable}` |" in page

    def test_example_is_valid(self) -> None:
        """The page's example is a valid file."""
        lines = [line.strip() for line in configuration_reference().splitlines() if line.startswith("    ")]
        example: dict[str, Any] = tomllib.loads("\n".join(lines))
        assert config_from_mapping(example).schedule.quorum == 3


@pytest.mark.parametrize("schedule", [{"kind": "barrier"}, {"kind": "quorum", "quorum": 2}])
def test_a_window_of_several_rounds_fits_every_schedule(schedule: dict[str, object]) -> None:
    """Under a barrier or a quorum it makes pushes late, which ordered momentum puts in their place."""
    assert config_from_mapping({"schedule": schedule, "exchange": {"window": 2}}).exchange.window == 2
