"""Whether Ctrl-C was pressed, which an exception does not always tell.

Python turns the signal into a KeyboardInterrupt wherever it happens to be. Compiled code that calls Python may replace
it by an error of its own: safetensors says "could not determine the shape of object type" (2 of 100 interrupts of a run
that were sent as a block was priced).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether an interrupt came since; it is raised as a KeyboardInterrupt as always.

    Sees nothing outside the main thread, or where the process ignores interrupts or has a handler of its own.
    """
    came, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield came.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
