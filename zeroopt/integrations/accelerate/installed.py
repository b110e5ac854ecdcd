"""What this integration needs, or an ImportError that says so."""

from __future__ import annotations

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError(
        "zeroopt.integrations.accelerate needs accelerate (tried with 1.15.0): pip install accelerate"
    ) from error
