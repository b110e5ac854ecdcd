"""Hosts on one machine: namespaces of network and processes, and links between them that are held to a rate.

    host 0: link0 ── veth ──┐                       with a delay:   host 0: link0 ── TUN ──┐
    host 1: link0 ── veth ──┤ bridge                                host 1: link0 ── TUN ──┤ relay.py
    host 2: link0 ── veth ──┘                                       host 2: link0 ── TUN ──┘

A token bucket (`tc ... tbf`) at each end of a veth holds what a host sends and what it receives to the link's rate; with a delay, what it
receives is held by the relay. Ranks of different hosts see neither each other's processes nor memory, as in containers.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from secrets import token_hex
from typing import Any

from bench.launch import Failure, RankFailed
from bench.network.first import Job
from bench.network.link import Link

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "link0"  # of every host
SWITCH = "switch"
BURST_BYTES = 128 * 1024  # of what has been saved up, more than a packet that the kernel hands over at once
QUEUE_BYTES = 4 * 2**20  # that wait for the link before packets are lost
CONGESTION_CONTROL = "cubic"  # what most servers have
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICE, "TORCH_CPP_LOG_LEVEL": "ERROR"}
LATE_S = 10.0  # what hosts get beyond the time limit of their ranks
FIRST_PORT = 29500
ADDRESSES = "10.231.0.0/24"


class NoHosts(Exception):
    """There can be none on this machine."""


class Hosts:
    """Runs functions on the ranks of all hosts; made by `connected_hosts`.

    Attributes:
        num_hosts, ranks_a_host: of which there are as many on each.
        link: of each host.
    """

    def __init__(self, namespaces: list[str], ranks_a_host: int, link: Link) -> None:
        self.num_hosts, self.ranks_a_host, self.link = len(namespaces), ranks_a_host, link
        self._jobs = 0
        self._hosts = [start_first(namespace) for namespace in namespaces]

    @property
    def world_size(self) -> int:
        return self.num_hosts * self.ranks_a_host

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """What a function returns on each rank; ranks 0, 1, ... are on the first host.

        Raises:
            RankFailed: one of them has failed, or has not returned in time.
        """
        self._jobs += 1
        address = f"tcp://{address_of(0)}:{FIRST_PORT + self._jobs}"  # of its own: the last one may not be free yet
        for number, host in enumerate(self._hosts):
            first_rank = number * self.ranks_a_host
            ranks = range(first_rank, first_rank + self.ranks_a_host)
            assert host.stdin is not None
            host.stdin.write(pickle.dumps(Job(function, args, ranks, self.world_size, address, timeout_s)))
            host.stdin.flush()
        answers = [answer for host in self._hosts for answer in read_answer(host, timeout_s + LATE_S)]
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        if failures:
            first = min(failures, key=lambda failure: failure.moment)
            raise RankFailed(first.reason, first.traceback)
        return answers

    def close(self) -> None:
        for host in self._hosts:
            host.kill()  # unshare takes the namespace's first process along, and that one all others
            host.communicate()


@contextmanager
def connected_hosts(num_hosts: int, ranks_a_host: int, link: Link) -> Iterator[Hosts]:
    """Hosts that are joined by links.

    Raises:
        NoHosts: this machine permits none.
    """
    if (reason := what_is_missing(link)) is not None:
        raise NoHosts(reason)
    name = f"zeroopt-{token_hex(4)}"
    namespaces = [f"{name}-{number}" for number in range(num_hosts)]
    with ExitStack() as stack:
        try:
            for namespace in [*namespaces, f"{name}-{SWITCH}"]:
                call("ip", "netns", "add", namespace)
                stack.callback(call, "ip", "netns", "delete", namespace)
            join(namespaces, f"{name}-{SWITCH}", link, stack)
            call(*within(namespaces[0]), "true")
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        hosts = Hosts(namespaces, ranks_a_host, link)
        stack.callback(hosts.close)
        yield hosts


def what_is_missing(link: Link) -> str | None:
    """Why there can be no hosts here, as far as that shows before one is made."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"network namespaces need the program {program!r} (of the package {package})"
    if link.delay_s and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "a link with a delay needs /dev/net/tun"
    return None


def join(namespaces: list[str], switch: str, link: Link, stack: ExitStack) -> None:
    """Lay the links, which exist in these namespaces only and so cannot collide with anything."""
    if link.delay_s:
        stack.enter_context(relaying(namespaces, link))
    else:
        call("ip", "-n", switch, "link", "add", SWITCH, "type", "bridge")
        call("ip", "-n", switch, "link", "set", SWITCH, "addrgenmode", "none", "up")
        for number, namespace in enumerate(namespaces):
            port = f"port{number}"
            call("ip", "link", "add", DEVICE, "netns", namespace, "type", "veth", "peer", "name", port, "netns", switch)
            call("ip", "-n", switch, "link", "set", port, "master", SWITCH, "addrgenmode", "none", "up")
            limit(switch, port, link)
    for number, namespace in enumerate(namespaces):
        ip = ("ip", "-n", namespace)
        call(*ip, "address", "add", f"{address_of(number)}/24", "dev", DEVICE)
        call(*ip, "link", "set", DEVICE, "addrgenmode", "none", "up")  # IPv6 would send messages of its own
        call(*ip, "link", "set", "lo", "up")
        limit(namespace, DEVICE, link)
        choose_congestion_control(namespace, address_of(number))


def limit(namespace: str, device: str, link: Link) -> None:
    """Hold what leaves by a device to the link's rate."""
    bucket = ("burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
    call(
        *("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf"),
        *("rate", f"{link.bits_a_second:.0f}bit", *bucket),
    )


def choose_congestion_control(namespace: str, address: str) -> None:
    """For this route alone: what a whole namespace uses can only be chosen from what the machine allows everyone."""
    route = (ADDRESSES, "dev", DEVICE, "proto", "kernel", "scope", "link", "src", address)
    call("ip", "-n", namespace, "route", "change", *route, "congctl", CONGESTION_CONTROL)


@contextmanager
def relaying(namespaces: list[str], link: Link) -> Iterator[None]:
    """A relay between hosts, and a device of it on each."""
    arguments = [DEVICE, str(link.delay_s), str(link.bits_a_second), *namespaces]
    relay = subprocess.Popen(
        [sys.executable, "-m", "bench.network.relay", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert relay.stdout is not None
        if not relay.stdout.readline():
            raise NoHosts("the relay between hosts does not start; what it says is above")
        yield
    finally:
        relay.kill()
        relay.communicate()


def start_first(namespace: str) -> subprocess.Popen[bytes]:
    """The first process of a host."""
    return subprocess.Popen(
        [*within(namespace), sys.executable, "-m", "bench.network.first"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )


def read_answer(host: subprocess.Popen[bytes], timeout_s: float) -> list[Any]:
    """What the ranks of a host have returned."""
    assert host.stdout is not None
    if not wait([host.stdout.fileno()], timeout_s):
        raise RankFailed(f"a host has not answered within {timeout_s:.0f} s")
    with suppress(EOFError):
        answers: list[Any] = pickle.load(host.stdout)
        return answers
    raise RankFailed("a host's first process has ended")


def within(namespace: str) -> list[str]:
    """What to put before a command, so that it runs on a host as the first process of a new PID namespace."""
    return ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def address_of(host: int) -> str:
    return f"10.231.0.{host + 1}"


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
