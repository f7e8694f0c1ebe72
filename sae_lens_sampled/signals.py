"""SIGINT and SIGTERM as an exception, at moments when stopping loses nothing."""

import signal
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.exit_status = 128 + received  # as a shell has it
        self.signal_name = signal.Signals(received).name


class Signals:
    """Both signals within a `with` block: they raise `Interrupted` there, at once or, while held, when released.

    The first one counts: what it has begun, saving a checkpoint, is not disturbed by the next.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._held = False

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
