"""Several hosts on one machine: network namespaces joined by links of limited bandwidth. Needs Linux and root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import refuse_to_run

INTERFACE = "eth0"
HEADERS = 14 + 20 + 32  # bytes per packet: Ethernet, IP, and TCP with time stamps


@dataclass
class Host:
    """The place of one process: the prefix of its command, its IP address, and its network interface."""

    prefix: list[str]
    address: str
    interface: str


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Yield ``count`` simulated hosts on one switch, and remove them when the block ends. ``limit`` slows their links.

    Raises:
        PermissionError: the user is not root, ``ip`` or ``tc`` (iproute2) is missing, or one of their commands fails.
    """
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        raise PermissionError("network namespaces need root, and `ip` and `tc` of iproute2")
    base = f"grass-{os.getpid()}"
    switch, names = f"{base}-switch", [f"{base}-{i}" for i in range(count)]
    try:
        _run(f"ip netns add {switch}")
        _run(f"ip -n {switch} link add br0 type bridge")
        _run(f"ip -n {switch} link set br0 up")
        for i, name in enumerate(names):
            _run(f"ip netns add {name}")
            _run(f"ip link add {INTERFACE} netns {name} type veth peer name port{i} netns {switch}")
            _run(f"ip -n {switch} link set port{i} master br0 up")
            _run(f"ip -n {name} addr add {_address(i)}/24 dev {INTERFACE}")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set {INTERFACE} up")
        yield [Host(["ip", "netns", "exec", name], _address(i), INTERFACE) for i, name in enumerate(names)]
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def loopback(count: int) -> list[Host]:
    """Return ``count`` places for processes that share this machine's loopback interface. They cannot be limited."""
    return [Host([], "127.0.0.1", "lo") for _ in range(count)]


def limit(interface: str, mbit: float) -> None:
    """Limit the sending rate of this process's host to ``mbit`` Mbit/s."""
    _run(f"tc qdisc replace dev {interface} root tbf rate {mbit}mbit burst 1mb latency 200ms")


def sent_bytes(interface: str) -> int:
    """Return the bytes that ``interface`` has sent in this process's namespace, without packet headers."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith(f"{interface}:"))
    fields = line.partition(":")[2].split()
    size, packets = int(fields[8]), int(fields[9])
    return size - HEADERS * packets


def _address(i: int) -> str:
    return f"10.77.0.{i + 1}"


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"`{command}`: {done.stderr.strip()}")


if __name__ == "__main__":
    refuse_to_run("network", "scaling")
