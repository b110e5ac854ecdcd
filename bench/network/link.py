"""How fast a host's link is, and how long it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Link:
    """What joins a host to the others, in each direction.

    Attributes:
        bits_a_second: that leave a host, and as many that reach it.
        delay_s: from one host to another.
    """

    bits_a_second: float
    delay_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Link:
        """Such as "1gbit", "100mbit" or "100mbit+10ms".

        Raises:
            ValueError: it is none.
        """
        match = re.fullmatch(r"([0-9.]+)(kbit|mbit|gbit)(?:\+([0-9.]+)ms)?", text)
        if match is None:
            raise ValueError(f"expected a link such as 1gbit, 100mbit or 100mbit+10ms, got {text!r}")
        number, unit, delay = match.groups()
        return cls(float(number) * _UNITS[unit], float(delay or 0) / 1e3)

    def __str__(self) -> str:
        unit = "gbit" if self.bits_a_second >= 1e9 else "mbit"
        rate = f"{self.bits_a_second / _UNITS[unit]:g} {unit[0].upper()}b/s"
        return rate + (f", {1e3 * self.delay_s:g} ms" if self.delay_s else "")

    def seconds(self, num_bytes: float) -> float:
        """That so many bytes take at least."""
        return 8 * num_bytes / self.bits_a_second
