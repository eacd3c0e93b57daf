"""Has the compiled loops ready where they pay: loaded once, in a thread of their own, and done without until then.

`loops` needs numba, whose import takes a quarter of a second, and compiling takes some more the first time on a
machine. A process that never sees a large fragment pays nothing of it; others go the plain way meanwhile, and for good
where numba cannot be imported. The bits are the same, so nobody notices but by the time it takes.

Arrays are not counted (`_nrt`): they are the caller's, who waits. numba would count each slice of a block up and down,
in an atomic operation each, which were half of the samples of a profile of the encoding.

numba keeps what it has compiled in `__pycache__` beside `loops`, where it may not write there in the user's cache
folder, and always in NUMBA_CACHE_DIR if that is set. Where it may write nowhere, every process compiles anew.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_log = logging.getLogger(__name__)

LEAST_ELEMENTS = 64 * 1024
"""Elements from which the loops are loaded and called; fewer are done in a millisecond anyhow."""

_FLOATS, _DOUBLES, _BYTES = "float32[::1]", "float64[::1]", "uint8[::1]"
_SIGNATURES = {
    "encode": f"void(int64, {_FLOATS}, {_FLOATS}, {_BYTES})",
    "decode": f"void(int64, {_FLOATS}, {_BYTES}, {_FLOATS})",
    "squares": f"void(int64, {_FLOATS}, {_BYTES}, {_DOUBLES})",
    "step": f"void(int64, {_FLOATS}, {_BYTES}, {_FLOATS}, {_FLOATS}, {_FLOATS}, float32, float32, {_FLOATS})",
    "compensate": f"void(int64, {_FLOATS}, {_FLOATS}, {_FLOATS}, {_FLOATS}, {_BYTES}, {_FLOATS})",
    "move": f"boolean(int64, {_FLOATS}, {_FLOATS}, {_FLOATS}, {_BYTES}, {_FLOATS})",
    "follow": f"boolean(int64, {_FLOATS}, {_BYTES}, {_FLOATS}, {_FLOATS}, {_FLOATS})",
}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of `loops`, compiled, under their names there. They take numpy arrays and release the GIL.

    A kernel does whole blocks of 256 elements; arrays are contiguous and start where their numbers may.
    """

    encode: Callable[..., None]
    decode: Callable[..., None]
    squares: Callable[..., None]
    step: Callable[..., None]
    compensate: Callable[..., None]
    move: Callable[..., bool]
    follow: Callable[..., bool]


class _EndedError(Exception):
    """The process ends, and nobody needs the kernels any more."""


class _Loader:
    """Loads the kernels once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.kernels: Kernels | None = None

    def begin(self) -> threading.Thread:
        """Begin to load, unless that has begun; returns the thread that does it."""
        with self._lock:
            if self._thread is None:
                # No daemon: the interpreter must not go away beneath the compiler.
                self._thread = threading.Thread(target=self._load, name="paceline-kernels")
                self._thread.start()
            return self._thread

    def _load(self) -> None:
        try:
            self.kernels = _compiled()
        except ImportError as error:
            _log.info("numba cannot be imported, so the codecs' numbers take several times as long: %s", error)
        except _EndedError:
            return
        except Exception:  # noqa: BLE001  # whatever a compiler raises: the plain way has the same bits
            _log.warning(
                "the codecs' loops cannot be compiled, so their numbers take several times as long", exc_info=True
            )


_loader = _Loader()


def ready(num_elements: int) -> Kernels | None:
    """The kernels for so many elements; None if they are too few, or as long as the kernels are not loaded.

    Returns at once. The first call that has enough elements begins to load.
    """
    if num_elements < LEAST_ELEMENTS:
        return None
    if _loader.kernels is None:
        _loader.begin()
    return _loader.kernels


def load() -> Kernels | None:
    """Load the kernels and wait for them; None if this machine cannot have them."""
    _loader.begin().join()
    return _loader.kernels


def _compiled() -> Kernels:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        raise ImportError("NUMBA_DISABLE_JIT is set")
    numba: Any = import_module("numba")
    if numba.config.DISABLE_JIT:
        raise ImportError("numba is configured not to compile")
    loops: Any = import_module("paceline_wire.codecs.loops")
    return Kernels(**{name: _kernel(numba, getattr(loops, name), signature) for name, signature in _SIGNATURES.items()})


def _kernel(numba: Any, loop: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Compile a loop, or take it from the cache.

    Raises:
        _EndedError: The main thread has ended, which waits for this one.
    """
    if not threading.main_thread().is_alive():
        raise _EndedError
    compiled: Callable[..., Any]
    options = {"nogil": True, "error_model": "numpy", "_nrt": False}
    try:
        compiled = numba.njit(signature, cache=True, **options)(loop)
    except (OSError, RuntimeError) as error:
        _log.info("numba cannot keep what it compiles (set NUMBA_CACHE_DIR to a folder where it can): %s", error)
        compiled = numba.njit(signature, **options)(loop)
    return compiled
