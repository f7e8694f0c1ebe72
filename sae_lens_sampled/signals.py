"""Raise SIGINT and SIGTERM as exceptions, only where stopping loses nothing; replace handlers that SAELens leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException, interrupt_callback

PYTHONS_OWN = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Python's default handlers for both signals."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.exit_status = 128 + received  # as in a shell
        self.signal_name = signal.Signals(received).name


class Signals:
    """Make both signals raise `Interrupted` within a `with` block: at once or, while held, when released.

    Only the first signal counts: the next ones do not disturb what it has started, such as saving a checkpoint. At the
    end the previous handlers are restored. Outside the main thread, which alone receives signals, nothing is changed;
    nor is a handler that was installed from outside Python, because it could not be restored.
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
        except Interrupted:  # a signal arrived before the block began
            self._restore()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    @property
    def received(self) -> int:
        """Number of the first signal received; 0 if there is none."""
        return self._received or 0

    def hold(self) -> None:
        """Hold signals back from now on."""
        self._held = True

    def release(self) -> None:
        """Raise `Interrupted` if a signal was held back; otherwise a signal raises it at once from now on."""
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
    """Let signals end the work within, even if an earlier SAELens run in this process has left its signal handlers.

    SAELens' handlers raise an `Exception`, which code that goes on when a single SAE fails would mistake for
    such a failure.
    Within, in place of these handlers, SIGINT raises KeyboardInterrupt and SIGTERM ends the process, as in Python; an
    InterruptedException of a SAELens run within becomes a KeyboardInterrupt too. At the end the previous handlers are
    restored.
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
