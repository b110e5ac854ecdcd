"""Carries packets between hosts, each after a delay and no faster than a host's link lets it in.

    python -m bench.network.relay DEVICE DELAY_S BITS_A_SECOND NAMESPACE ...

    host 0: TUN device ── packets ──▶ this process ── after the delay, in turn ──▶ host 1: TUN device

The host whose place in the list is n has the address that ends in n + 1. Packets are large ones of TCP, whose headers the kernel
leaves to be completed (`IFF_VNET_HDR`), as a network card would: so few of them pass that Python is quick enough. It says so by a
line on stdout when all devices are there, and ends when stdin does.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_OFFLOADS = 0x1 | 0x2  # checksums, and segments of TCP over IPv4
_HEADER_BYTES = 10  # of a packet that the kernel leaves to be completed
_DESTINATION = _HEADER_BYTES + 19  # the last byte of an IPv4 packet's destination
_VERSION = _HEADER_BYTES
_MOST_BYTES = 2**17
_CLONE_NEWNET = 0x40000000


class Delivery:
    """What is on its way to one host, in the order of its arrival."""

    def __init__(self, device: int, bits_a_second: float) -> None:
        self.device = device
        self._seconds_a_byte = 8 / bits_a_second
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._is_free_at = 0.0

    def take(self, packet: bytes, earliest: float) -> None:
        """Let a packet arrive at that time, or as soon as those before it are through."""
        self._is_free_at = max(earliest, self._is_free_at) + len(packet) * self._seconds_a_byte
        self._waiting.append((self._is_free_at, packet))

    def deliver(self, now: float) -> None:
        """Hand over what has arrived by now."""
        while self._waiting and self._waiting[0][0] <= now:
            try:
                os.write(self.device, self._waiting.popleft()[1])
            except OSError:  # the host's queue is full or its device is down: the packet is lost, as on any network
                continue

    @property
    def next_at(self) -> float:
        return self._waiting[0][0] if self._waiting else float("inf")


def open_device(namespace: str, name: str) -> int:
    """A TUN device in another network namespace, made when it is opened. This process is left in that namespace."""
    with Path("/var/run/netns", namespace).open() as entry:
        if ctypes.CDLL(None, use_errno=True).setns(entry.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"entering network namespace {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _OFFLOADS)
    return device


def relay(deliveries: list[Delivery], delay_s: float) -> None:
    """Carry packets until stdin ends."""
    devices = {delivery.device for delivery in deliveries}
    while True:
        due = min(delivery.next_at for delivery in deliveries) - time.monotonic()
        ready, _, _ = select.select([sys.stdin, *devices], [], [], max(0.0, due) if due < float("inf") else None)
        if sys.stdin in ready:
            return
        for device in devices.intersection(ready):
            take_all(device, deliveries, delay_s)
        now = time.monotonic()
        for delivery in deliveries:
            delivery.deliver(now)


def take_all(device: int, deliveries: list[Delivery], delay_s: float) -> None:
    """Take what a host has sent."""
    while True:
        try:
            packet = os.read(device, _MOST_BYTES)
        except BlockingIOError:
            return
        host = packet[_DESTINATION] - 1 if packet[_VERSION] >> 4 == 4 else -1
        if 0 <= host < len(deliveries):  # else it is for nobody here
            deliveries[host].take(packet, time.monotonic() + delay_s)


def main() -> None:
    name, delay_s, bits_a_second, *namespaces = sys.argv[1:]
    deliveries = [Delivery(open_device(namespace, name), float(bits_a_second)) for namespace in namespaces]
    print("ready", flush=True)
    relay(deliveries, float(delay_s))


if __name__ == "__main__":
    main()
