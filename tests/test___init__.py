"""What `import zeroopt` offers."""

from __future__ import annotations

import zeroopt


def test_completion_offers_public_names_alone() -> None:
    assert [name for name in dir(zeroopt) if not name.startswith("__")] == sorted(
        set(zeroopt.__all__) - {"__version__"}
    )
    assert "__version__" in dir(zeroopt)


def test_all_names_are_found() -> None:
    found: dict[str, object] = {}
    exec("from zeroopt import *", found)  # noqa: S102
    assert set(zeroopt.__all__) <= set(found)
