"""Runs the services of docker-compose.yml without a container engine: what an engine would give them, Linux gives here.

Every service gets a network namespace of its own, with an address and a hosts file that names the others, and a root of
its own: this machine's, read-only, with what the Dockerfile copies into the image, the volumes where the service has
them, and a new /tmp. It runs as the image's user and with no more capabilities than the file grants. What the images
would install is what this Python has installed.

Not here, so for an engine to confirm: building the images, the limits on memory and processes, `init`, and what
restarts a service.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

ROOT = Path(__file__).resolve().parents[2]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What the base image sets."""

NEEDED = ("ip", "setpriv", "chroot", "mount")
"""Commands without which nothing of this works."""


def missing() -> str | None:
    """Why services cannot be run here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for namespaces"
    return next((f"needs the command {command}" for command in NEEDED if shutil.which(command) is None), None)


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Text of the compose file with ${NAME:-default} replaced, and $$ by one dollar sign."""

    def value(match: "re.Match[str]") -> str:
        return "$" if match[0] == "$$" else variables.get(match[1]) or match[2]

    return re.sub(r"\$\$|\$\{(\w+):-([^}]*)\}", value, text)


@dataclass(frozen=True)
class Image:
    """What a Dockerfile says of the container.

    Attributes:
        text: Its lines, with continued ones joined.
        last: Those of the last stage.
    """

    text: str
    last: str

    @classmethod
    def read(cls, dockerfile: Path) -> Self:
        """Read a Dockerfile."""
        lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE))
        return cls(lines, re.split(r"^FROM .*$", lines, flags=re.MULTILINE)[-1])

    def said(self, instruction: str) -> str | None:
        """The last arguments of an instruction."""
        found = re.findall(rf"^{instruction}\s+(.*)$", self.last, re.MULTILINE)
        return found[-1] if found else None

    def words(self, instruction: str) -> list[str]:
        """The last arguments of an instruction in the form of a JSON list; none: empty."""
        words: list[str] = json.loads(self.said(instruction) or "[]")
        return words

    @property
    def copied(self) -> dict[Path, Path]:
        """Files and folders of the repository that are copied beside what is installed, by where they go."""
        everywhere = re.findall(r"^COPY (\S+) (/opt/paceline/\S+)$", self.text, re.MULTILINE)
        return {Path(target): ROOT / source for source, target in everywhere}

    @property
    def owned(self) -> list[str]:
        """Folders that are made for the image's user: new volumes there begin with this owner."""
        return re.findall(r"install --directory --owner=\d+ --group=\d+ (\S+)", self.last)


class Service:
    """One service of the file.

    Args:
        said: What the file says of it.
        variables: The environment of `docker compose`.
    """

    def __init__(self, said: dict[str, Any], variables: Mapping[str, str]) -> None:
        self._said = said
        self._variables = variables

    @cached_property
    def image(self) -> Image:
        """Its image."""
        return Image.read(ROOT / self._said["build"]["dockerfile"])

    @property
    def command(self) -> list[str]:
        """What it runs, going by the file and then by the image."""
        entrypoint = self._said.get("entrypoint", self.image.words("ENTRYPOINT"))
        command = self._said.get("command", [] if "entrypoint" in self._said else self.image.words("CMD"))
        return [_interpolated(word, self._variables) for word in [*entrypoint, *command]]

    @property
    def environment(self) -> dict[str, str]:
        """Its variables, but for those that every container has."""
        return {name: _interpolated(text, self._variables) for name, text in self._said.get("environment", {}).items()}

    @property
    def user(self) -> str:
        """Its user and group, in numbers."""
        return str(self._said.get("user") or self.image.said("USER"))

    @property
    def capabilities(self) -> list[str]:
        """What it may do beyond an ordinary user."""
        assert self._said["cap_drop"] == ["ALL"]
        return [name.lower() for name in self._said.get("cap_add", [])]

    @property
    def volumes(self) -> list[tuple[str, str, bool]]:
        """Name and place of its volumes, and whether it may only read them."""
        split = [volume.split(":") for volume in self._said.get("volumes", [])]
        return [(name, target, options == ["ro"]) for name, target, *options in split]

    @property
    def health_check(self) -> list[str]:
        """The command that says whether it is healthy."""
        words: list[str] = self._said["healthcheck"]["test"]
        assert words[0] == "CMD"
        return words[1:]

    @property
    def stop_signal(self) -> str:
        """The signal that asks it to end."""
        return str(self.image.said("STOPSIGNAL"))

    @property
    def has_network(self) -> bool:
        """Whether it reaches the others."""
        return self._said.get("network_mode") != "none"


class Composition:
    """The services of the compose file, each on a host of its own; a context manager that removes all of it.

    Args:
        folder: An empty folder for volumes and images.
        variables: The environment of `docker compose`.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        said = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        self.services = {name: Service(each, variables) for name, each in said["services"].items()}
        self._volumes: dict[str, Path] = {name: folder / "volumes" / name for name in said["volumes"]}
        self._images = folder / "images"
        self._prefix = f"paceline-{os.getpid()}"
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        with self._stack as stack:
            for path in self._volumes.values():
                path.mkdir(parents=True)
            self._own_volumes()
            switch = f"{self._prefix}-switch"
            self._add_namespace(stack, switch)
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "link", "set", "switch", "up")
            for number, name in enumerate(self.services, start=1):
                self._add_host(stack, switch, number, name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._stack.close()

    def volume(self, name: str) -> Path:
        """Where a volume is kept."""
        return self._volumes[name]

    def start(self, name: str, *, command: list[str] | None = None) -> "subprocess.Popen[str]":
        """Start a service, or another command in its place; what it prints, errors too, is in stdout."""
        service = self.services[name]
        environ = {"PATH": f"{Path(sys.executable).parent}:{PATH}", **service.environment}
        environ |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
        inside = ["ip", "netns", "exec", self._namespace(name)]
        process = subprocess.Popen(
            [*inside, "sh", "-euc", self._script(name, command or service.command)],
            env=environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def stop(self, name: str, process: "subprocess.Popen[str]") -> None:
        """Ask a service's process to end, as its image says."""
        process.send_signal(signal.Signals[self.services[name].stop_signal])

    def is_healthy(self, name: str) -> bool:
        """Run a service's health check once."""
        process = self.start(name, command=self.services[name].health_check)
        process.communicate()
        return process.returncode == 0

    def _script(self, name: str, command: list[str]) -> str:
        """Makes the root of a service in the namespace's own mounts, and becomes its command."""
        service = self.services[name]
        root, layer = "/mnt/root", "/mnt/layer"
        pythons = {str(Path(path).resolve()) for path in (ROOT, sys.prefix, sys.base_prefix)}
        pythons |= {str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(":") if path}
        targets = [target for _, target, _ in service.volumes] + [str(service.image.said("WORKDIR"))]
        lines = ["mount -t tmpfs tmpfs /mnt", f"mkdir {root} {layer}"]
        lines += [f"mkdir -p {layer}{shlex.quote(str(path.parent))}" for path in service.image.copied]
        # Folders of the layer hide the modes of this machine's, so that the user may pass through root's to Python.
        lines += [f"mkdir -p {layer}{shlex.quote(place)}" for place in (*targets, *sorted(pythons))]
        lines += [
            f"cp -r {shlex.quote(str(source))} {layer}{target}" for target, source in service.image.copied.items()
        ]
        lines += [f"mount -t overlay overlay -o lowerdir={layer}:/ {root}"]
        lines += [f"mount --rbind /{place} {root}/{place}" for place in ("proc", "sys", "dev")]
        lines += [f"mount --bind /etc/hosts {root}/etc/hosts"]
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"]  # noqa: S108  # it is the service's own
        for path in sorted(pythons):
            place = shlex.quote(path)
            lines += [f"mkdir -p {root}{place}"] if path.startswith("/tmp/") else []  # noqa: S108  # the new one is empty
            lines += [f"mount --bind -o ro {place} {root}{place}"]
        for volume, target, read_only in service.volumes:
            lines += [f"mount --bind {shlex.quote(str(self._volumes[volume]))} {root}{target}"]
            lines += [f"mount -o remount,bind,ro {root}{target}"] if read_only else []
        user, _, group = service.user.partition(":")
        bounding = ",".join(["-all", *(f"+{capability}" for capability in service.capabilities)])
        become = [
            "chroot",
            root,
            "env",
            f"--chdir={service.image.said('WORKDIR')}",
            "setpriv",
            "--reuid",
            user,
            "--regid",
            group,
            "--clear-groups",
            "--no-new-privs",
        ]
        become += [f"--bounding-set={bounding}", "--inh-caps=-all", "--", *command]
        return "\n".join([*lines, f"exec {shlex.join(become)}"])

    def _own_volumes(self) -> None:
        """Give new volumes the owner that the image's folders have."""
        for service in self.services.values():
            user, _, group = str(service.image.said("USER")).partition(":")
            for name, target, _ in service.volumes:
                if target in service.image.owned:
                    os.chown(self._volumes[name], int(user), int(group))

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _add_namespace(self, stack: ExitStack, name: str) -> None:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "delete", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _add_host(self, stack: ExitStack, switch: str, number: int, name: str) -> None:
        namespace = self._namespace(name)
        self._add_namespace(stack, namespace)
        etc = Path("/etc/netns") / namespace
        stack.callback(shutil.rmtree, etc, ignore_errors=True)
        etc.mkdir(parents=True)
        addresses = {other: f"10.77.0.{index}" for index, other in enumerate(self.services, start=1)}
        hosts = [f"{address} {other}\n" for other, address in addresses.items()]
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        if not self.services[name].has_network:
            return
        _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
        _ip("-n", namespace, "address", "add", f"{addresses[name]}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S607  # wherever it is
