"""The exceptions of zeroopt. All derive from ``ZeroOptError`` and from the built-in class that fits."""


class ZeroOptError(Exception):
    """Base class of all exceptions that zeroopt raises on its own account."""


class ConfigError(ZeroOptError, ValueError):
    """Raised when an argument or a combination of options cannot be right."""


class NotSupportedError(ZeroOptError, NotImplementedError):
    """Raised when a request makes sense but zeroopt does not implement it."""


class RankMismatchError(ZeroOptError, RuntimeError):
    """Raised on every rank when ranks differ in what must be the same on all of them."""


class NonFiniteError(ZeroOptError, FloatingPointError):
    """Raised on every rank when a gradient is infinite or not a number and somebody has asked to be told."""


class StateError(ZeroOptError, RuntimeError):
    """Raised when a call comes at the wrong time, such as a step before any backward."""


class KernelUnavailableError(ZeroOptError, RuntimeError):
    """Raised when a kernel is called that this build of ``zeroopt._C`` does not contain."""


class CollectiveError(ZeroOptError, RuntimeError):
    """Raised when a collective cannot come to its end: a rank died, stopped, gave up or does something else."""


class CheckpointError(ZeroOptError, RuntimeError):
    """Raised when a checkpoint cannot be written whole, or is damaged, foreign or not there."""
