"""Files of [security] that are replaced while a server serves, by bad ones and by good ones."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cryptography import x509

import paceline
from integration.authority import make_authority, run_certs, security_of, token_of
from integration.patience import PATIENCE_S, wait_until, wait_until_async
from paceline_wire.errors import UnauthenticatedError

PLAIN, OTHER_PLAIN = "correct-horse-battery", "staple-of-another-kind"
TOLD = "cannot be used, so what it said before stays"
START = {"x": torch.ones(3)}

# Root reads files of any mode, unless it gives that up.
BOUND_BY_MODES: tuple[str, ...] = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
if os.geteuid() != 0:
    BOUND_BY_MODES = ()


@contextmanager
def served(log: Path, security: dict[str, str], *prefix: str) -> Iterator[str]:
    """A server process of its own; the address is localhost's, and the log is in a file."""
    environment = {**os.environ, **{f"PACELINE_SECURITY__{name.upper()}": value for name, value in security.items()}}
    command = [*prefix, sys.executable, "-m", "paceline", "-vv", "serve", "--json", "--listen", "127.0.0.1:0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    with process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"].replace("127.0.0.1", "localhost")
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


class Files:
    """The files of a server, and what its log says of each.

    Each of these is looked at by itself; server.pem and server.key together.
    """

    NAMES = ("server.pem", "tokens", "token.pub", "revoked")

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder / "server"
        self.whole = {name: (self.folder / name).read_bytes() for name in self.NAMES}
        self._log = log

    def put(self, name: str, content: bytes, mode: int = 0o600) -> None:
        """Replace a file, at once."""
        new = self.folder / ".new"
        new.write_bytes(content)
        new.chmod(mode)
        new.replace(self.folder / name)

    def half(self, name: str) -> bytes:
        """The first half of what the file was."""
        return self.whole[name][: len(self.whole[name]) // 2]

    def complaints(self) -> list[int]:
        """How often the log says of each file that it cannot be used."""
        lines = [line for line in self._log.read_text().splitlines() if TOLD in line]
        names = [(name, "server.key") if name == "server.pem" else (name,) for name in self.NAMES]
        return [sum(any(f"/{name}'" in line for name in each) for line in lines) for each in names]

    async def complain(self, expected: list[int]) -> None:
        """Wait until the log says so of each file, and no more than that."""
        await asyncio.to_thread(wait_until, lambda: sum(self.complaints()) >= sum(expected))
        assert self.complaints() == expected

    def taken(self) -> int:
        """How often the log says that files were read again."""
        return self._log.read_text().count("read again: ")


def break_in_content(files: Files) -> None:
    """A cut certificate, a key of another kind than is known, words that are no tokens and no ids."""
    files.put("server.pem", files.half("server.pem"))
    files.put("token.pub", files.whole["token.pub"].replace(b"MCowBQYDK2Vw", b"MCowBQYDK2V/"))
    files.put("tokens", b"two words\n")
    files.put("revoked", b"nothing that is an id\n")


def take_away(files: Files) -> None:
    """A certificate of another key, a file that is gone, one that is cut, and one that is empty."""
    files.put("server.pem", (files.folder / "ca.pem").read_bytes())
    files.put("token.pub", files.whole["token.pub"] + files.half("token.pub"))
    (files.folder / "tokens").unlink()
    files.put("revoked", b"")


def lock(files: Files) -> None:
    """All as it was, but for nobody to read."""
    for name in files.NAMES:
        files.put(name, files.whole[name], mode=0)


BREAK: tuple[Callable[[Files], None], ...] = (break_in_content, take_away, lock)
if BOUND_BY_MODES and shutil.which(BOUND_BY_MODES[0]) is None:
    BOUND_BY_MODES, BREAK = (), BREAK[:-1]


async def test_bad_files_change_nothing_and_good_ones_are_taken(tmp_path: Path) -> None:
    """The server goes on with what it had, and says so once; a worker and new connections notice nothing."""
    folder, log = tmp_path / "certs", tmp_path / "log"
    make_authority(folder, "--worker", "a", "--worker", "gone")
    run_certs("revoke", str(folder), "gone")
    (folder / "server" / "tokens").write_text(f"{PLAIN}\n")
    files = Files(folder, log)
    key = (folder / "server" / "server.key").read_text()
    ca = folder / "server" / "ca.pem"
    security = {**security_of(folder), "token_file": str(folder / "server" / "tokens")}
    with served(log, security, *BOUND_BY_MODES) as address:

        async def lets_in(token: str) -> bool:
            try:
                async with paceline.connect(address, token=token, tls=ca) as client:
                    return bool((await client.fetch()).bins)
            except UnauthenticatedError:
                return False

        async with paceline.connect(address, worker_id="a", token=token_of(folder, "a"), tls=ca) as worker:
            await worker.initialize(START)
            base = await worker.fetch()
            for number, break_files in enumerate(BREAK, start=1):
                break_files(files)
                await files.complain([number] * 3 + [2 * number - 1])
                base = await worker.exchange({"x": torch.zeros(3)}, base)
                assert [await lets_in(token) for token in (token_of(folder, "a"), PLAIN)] == [True, True]
                assert not await lets_in(token_of(folder, "gone"))
                # At the next look only this one has changed.
                files.put("revoked", b"another line without an id\n")
                await files.complain([number] * 3 + [2 * number])
            assert files.taken() == 0
            files.put("revoked", files.whole["revoked"])
            for name in files.NAMES[:-1]:
                if BREAK[-1] is lock:
                    (files.folder / name).chmod(0o600)
                else:
                    files.put(name, files.whole[name])
            await asyncio.to_thread(wait_until, lambda: files.taken() == len(files.NAMES))
            await good_files_are_taken(files, address, lets_in, tmp_path)
            await worker.exchange({"x": torch.zeros(3)}, base)
    assert files.complaints() == [len(BREAK)] * 3 + [2 * len(BREAK)]
    secrets = [PLAIN, OTHER_PLAIN, *key_lines(key), *token_of(folder, "a").split(".")[1:]]
    assert not [secret for secret in secrets if secret in log.read_text()]


def key_lines(pem: str) -> list[str]:
    """The lines that are a key."""
    return [line for line in pem.splitlines() if not line.startswith("-----")]


async def good_files_are_taken(files: Files, address: str, lets_in: Any, tmp_path: Path) -> None:
    """A new certificate, a second key for tokens, another plain token, and a list without the revoked worker."""
    other = tmp_path / "other"
    make_authority(other, "--worker", "new")
    run_certs("renew", str(files.folder.parent), "--server", "localhost")
    serial = x509.load_pem_x509_certificate((files.folder / "server.pem").read_bytes()).serial_number
    files.put("token.pub", files.whole["token.pub"] + (other / "server" / "token.pub").read_bytes())
    files.put("tokens", f"{OTHER_PLAIN}\n".encode())
    files.put("revoked", b"# nobody\n")

    async def all_are() -> bool:
        host, _, port = address.rpartition(":")
        shown = x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode())
        known = [token_of(other, "new"), OTHER_PLAIN, token_of(files.folder.parent, "gone")]
        return shown.serial_number == serial and all([await lets_in(token) for token in known])

    await wait_until_async(all_are)
    assert not await lets_in(PLAIN)
    assert await lets_in(token_of(files.folder.parent, "a"))
