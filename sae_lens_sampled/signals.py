"""SIGINT and SIGTERM as an exception, at moments when stopping loses nothing; and as Python has them, after SAELens."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException, interrupt_callback

PYTHONS_OWN = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What Python does with both signals where nobody has said otherwise."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.exit_status = 128 + received  # as a shell has it
        self.signal_name = signal.Signals(received).name


class Signals:
    """Both signals within a `with` block: they raise `Interrupted` there, at once or, while held, when released.

    The first one counts: what it has begun, saving a checkpoint, is not disturbed by the next. At the end the handlers
    are those from before. Outside the main thread, which alone gets signals, nothing happens; nor to a handler that was
    installed from outside Python, which could not be put back.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._held = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in PYTHONS_OWN:
                if _is_ours_to_replace(number):
                    self._previous[number] = signal.getsignal(number)
                    signal.signal(number, self._receive)
        except Interrupted:  # a signal that came between the two
            self._restore()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    @property
    def received(self) -> int:
        """Number of the signal that has come; 0 if none has."""
        return self._received or 0

    def hold(self) -> None:
        """Let signals wait from here on."""
        self._held = True

    def release(self) -> None:
        """Obey a signal that waits, and later ones at once."""
        self._held = False
        if self._received is not None:
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._received is None:
            self._received = number
            if not self._held:
                raise Interrupted(number)

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends the work within like Ctrl-C does, where a run of SAELens in this process has left its signal handlers.

    They raise an `Exception`, which whoever goes on after the errors of one SAE takes for one of these. Within, SIGINT
    raises KeyboardInterrupt and SIGTERM ends the process, as in Python; an exception of a run of SAELens within becomes
    a KeyboardInterrupt too. At the end the handlers are those from before.
    """
    before = {number: signal.getsignal(number) for number in PYTHONS_OWN if _is_ours_to_replace(number)}
    try:
        for number, handler in before.items():
            if handler is interrupt_callback:
                signal.signal(number, PYTHONS_OWN[number])
        yield
    except InterruptedException as error:
        raise KeyboardInterrupt from error
    finally:
        for number, handler in before.items():
            if interrupt_callback in (handler, signal.getsignal(number)):
                signal.signal(number, handler)


def _is_ours_to_replace(number: int) -> bool:
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) is not None
