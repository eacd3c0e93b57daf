"""The security part of the configuration: TLS files, and what callers must present.

Tokens never appear in a repr, a dump or an error.
"""

import re
from pathlib import Path

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from paceline_server.config_base import Section, check_readable
from paceline_wire.errors import ConfigurationError

_PRINTABLE = re.compile(r"[!-~]+")


class SecurityConfig(Section):
    """Who may connect, and how the connection is protected."""

    tls_cert: Path | None = Field(
        default=None,
        description="PEM file with the server's certificate chain. Left out: no TLS.",
    )
    tls_key: Path | None = Field(
        default=None,
        validate_default=True,
        description="PEM file with the certificate's private key.",
    )
    client_ca: Path | None = Field(
        default=None,
        description="PEM file with the authorities whose client certificates are accepted; needs TLS. Left out: none "
        "are asked for.",
    )
    tokens: tuple[SecretStr, ...] = Field(
        default=(),
        description="Tokens, one of which a worker must present. None here nor in the token file: no token is asked "
        "for. Flags and variables can be seen by others on the machine: prefer the token file.",
    )
    token_file: Path | None = Field(
        default=None,
        description="File with further tokens, one a line; lines that start with # are comments.",
    )

    token_key: Path | None = Field(
        default=None,
        description="PEM file with the public key that signed tokens are checked with, or several (paceline certs). A "
        "signed token names who presents it and ends by itself; the tokens above let in any worker, for ever.",
    )
    revoked: Path | None = Field(
        default=None,
        description="File with the ids of revoked tokens and certificates, one at the beginning of each line. It is "
        "read again when it changes, as are all files of this table.",
    )
    insecure: bool = Field(
        default=False,
        description="Listen beyond loopback even without TLS, or without asking callers who they are: whoever reaches "
        "the port may then read and change the run.",
    )

    @field_validator("tls_cert", "tls_key", "client_ca", "token_key", "revoked")
    @classmethod
    def _file_is_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            check_readable(path)
        return path

    @field_validator("tls_key")
    @classmethod
    def _key_and_certificate_come_together(cls, tls_key: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert" in info.data and (tls_key is None) != (info.data["tls_cert"] is None):
            raise ValueError("security.tls_cert and security.tls_key are needed together")
        return tls_key

    @field_validator("client_ca")
    @classmethod
    def _client_ca_needs_tls(cls, client_ca: Path | None, info: ValidationInfo) -> Path | None:
        if client_ca is not None and info.data.get("tls_cert", client_ca) is None:
            raise ValueError("needs security.tls_cert")
        return client_ca

    @field_validator("tokens")
    @classmethod
    def _tokens_are_printable(cls, tokens: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, token in enumerate(tokens, start=1):
            _check_token(token.get_secret_value(), f"token {number}")
        return tokens

    @field_validator("token_file")
    @classmethod
    def _token_file_is_readable(cls, token_file: Path | None) -> Path | None:
        if token_file is not None:
            _read_tokens(token_file)
        return token_file

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls_cert is not None

    @property
    def asks_who_calls(self) -> bool:
        """Whether callers must show a certificate or a token."""
        return self.client_ca is not None or self.asks_for_tokens

    @property
    def asks_for_tokens(self) -> bool:
        """Whether callers must show a token."""
        return bool(self.tokens) or self.token_file is not None or self.token_key is not None

    def accepted_tokens(self) -> tuple[str, ...]:
        """Return the tokens given and those now in the token file, each once. Empty: no token is asked for.

        Raises:
            ConfigurationError: The token file can no longer be read, or no longer holds valid tokens.
        """
        tokens = [token.get_secret_value() for token in self.tokens]
        if self.token_file is not None:
            try:
                tokens += _read_tokens(self.token_file)
            except ValueError as error:
                raise ConfigurationError(f"security.token_file = '{self.token_file}': {error}.") from None
        return tuple(dict.fromkeys(tokens))


def _check_token(token: str, name: str) -> None:
    """Accept a token that can travel in a header; `name` stands for it in the error, which must not show it.

    Raises:
        ValueError: It is empty, or not printable ASCII without spaces.
    """
    if not _PRINTABLE.fullmatch(token):
        raise ValueError(f"{name} should be printable ASCII without spaces, at least one character")


def _read_tokens(path: Path) -> list[str]:
    """Read a token file: one token a line; empty lines and those that start with # are skipped.

    Raises:
        ValueError: The file cannot be read, some line is no token, or there is none: a file that was meant to protect
            a run must not leave it open.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    tokens = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            _check_token(line, f"line {number}")
            tokens.append(line)
    if not tokens:
        raise ValueError("holds no token")
    return tokens
