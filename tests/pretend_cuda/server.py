"""The process that has pretend devices: it runs functions that it is sent, one after the other."""

from __future__ import annotations

import gc
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from .build import load_device


def serve(connection: Connection) -> None:
    """Answer with ("value", …) or ("error", text) until the connection ends."""
    device = load_device()
    import zeroopt._C

    from . import ranks, surface
    from .kernels import Kernels

    device.set_package_folder(str(Path(zeroopt.__file__).parent))
    surface.install()
    ranks.install()
    Kernels().install(zeroopt._C)
    connection.send_bytes(pickle.dumps(("value", None)))
    modules = 0
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if len(sys.modules) > modules:
            modules = len(sys.modules)
            gc.collect()
            gc.freeze()  # leaves what was imported, which is much, out of every later collection
        try:
            answer = ("value", function(*args))
        except Exception:  # noqa: BLE001 - whatever it is, it is the caller's
            answer = ("error", traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
