"""Choice of a training step's path by timing the possible ones, on CUDA, where nothing has been measured."""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from sae_lens import logger
from torch import Tensor, nn

from sae_lens_sampled.step.kept_entries import Step, StepPath
from sae_lens_sampled.step.ranks import Ranks

MEASURED_DEVICES = ("cuda",)
"""Device types that are timed; on others the constants of `kept_entries.py` decide."""
AGAIN_AFTER_STEPS = 100
"""Steps after which paths are timed once more: by then about 1.3 entries per kept one exceed the bound, at first 4."""
DEAD_SHARE = 0.1
"""Share of dead latents above which paths are timed once more: AuxK slows a dense step down more than others."""
TOLERANCE, TOLERANCE_UNDER_AUTOCAST = 1e-5, 1e-2
"""Largest allowed difference from the dense path's loss, as a share of that loss."""
N_TIMED = 3
"""Number of timed forward and backward passes, after an untimed one."""
VARIABLE = "SAE_LENS_SAMPLED_STEP"
"""Environment variable that overrides `step="auto"`."""


class PathChoice(nn.Module):
    """The path that was timed as fastest, and when to time again. Saved in checkpoints."""

    record: Tensor
    """The path's place in `StepPath`, from 1 (0: not timed yet), the number of tokens, whether it was timed after
    `AGAIN_AFTER_STEPS`, and whether with many dead latents; int64, shape (4,)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("record", torch.zeros(4, dtype=torch.int64, device=device))
        self._known: list[int] | None = None  # the record, read from the device once

    def is_due(self, n_tokens: int, n_steps: int, dead_share: float) -> bool:
        """Whether to time the paths at this step."""
        path, tokens, late, dead = self._read()
        again = not late and n_steps >= AGAIN_AFTER_STEPS
        return path == 0 or tokens != n_tokens or again or (not dead and dead_share > DEAD_SHARE)

    @property
    def path(self) -> StepPath:
        """The path that was chosen last."""
        return get_args(StepPath)[self._read()[0] - 1]

    def remember(self, path: StepPath, n_tokens: int, n_steps: int, dead_share: float) -> None:
        """Record the path chosen at this step."""
        place = 1 + get_args(StepPath).index(path)
        self._known = [place, n_tokens, int(n_steps >= AGAIN_AFTER_STEPS), int(dead_share > DEAD_SHARE)]
        self.record.copy_(torch.tensor(self._known))

    def forget(self) -> None:
        """Discard the choice: it was timed for another kind of step."""
        self._known = [0] * len(self.record)
        self.record.zero_()

    def _read(self) -> list[int]:
        if self._known is None:
            self._known = self.record.tolist()
        return self._known

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._known = None


def fixed_step(step: Step) -> Step:
    """`step`, or the environment variable's value in place of "auto".

    Raises:
        ValueError: if that value is not a step.
    """
    if step != "auto" or not (wanted := os.environ.get(VARIABLE, "").strip()):
        return step
    if wanted not in get_args(Step):
        raise ValueError(f"{VARIABLE}={wanted!r} must be one of {', '.join(get_args(Step))}.")
    return wanted  # type: ignore[return-value]


class Measured(NamedTuple):
    """Timing of one path."""

    seconds: float
    """Median time of forward and backward; infinite if the path failed."""
    loss: float
    failure: str | None


def fastest_path(
    loss_by: Callable[[StepPath], Tensor], paths: Sequence[StepPath], parameters: list[nn.Parameter], ranks: Ranks
) -> StepPath:
    """The path with the fastest forward and backward pass; the times of those that work are logged.

    A path that fails, runs out of memory, or gives another loss than the dense one is skipped, with a warning.

    Args:
        loss_by: computes the loss of this batch by a path, without side effects.
        paths: the possible paths, the dense one among them.
        parameters: parameters to compute gradients of.
        ranks: the processes; all decide by the times of the slowest one.
    """
    device = parameters[0].device
    measured = {path: measure(partial(loss_by, path), parameters, device) for path in paths}
    under_autocast = torch.is_autocast_enabled(device.type)
    tolerance = TOLERANCE_UNDER_AUTOCAST if under_autocast else TOLERANCE
    dense = measured["dense"]
    seconds = {}
    for path, (own, loss, failure) in measured.items():
        if failure is None and dense.failure is None and not abs(loss - dense.loss) <= tolerance * abs(dense.loss):
            own, failure = float("inf"), f"its loss is {loss:.8g}, that of the dense step {dense.loss:.8g}"
        if failure is not None:
            warnings.warn(f"timing rejects the path {path!r}: {failure}", stacklevel=2)
        seconds[path] = own
    slowest = ranks.max(torch.tensor(list(seconds.values()), dtype=torch.float64, device=device)).tolist()
    times = dict(zip(seconds, slowest, strict=True))
    fastest = min(times, key=lambda path: times[path])
    if times[fastest] == float("inf"):
        fastest = "dense"  # its error then ends the run
    shown = ", ".join(f"{1000 * own:,.2f} ms by {path!r}" for path, own in times.items() if own < float("inf"))
    logger.info(
        f"sampled_topk: forward and backward take {shown or 'no finite time'}; steps take the path {fastest!r} until "
        "paths are timed again"
    )
    return fastest


def measure(loss_of: Callable[[], Tensor], parameters: list[nn.Parameter], device: torch.device) -> Measured:
    """Time a path, after one pass that compiles and fills caches."""
    seconds, loss = [], float("nan")
    try:
        for _ in range(1 + N_TIMED):
            start = now(device)
            value = loss_of()
            torch.autograd.grad(value, parameters, allow_unused=True)
            seconds.append(now(device) - start)
            loss = value.item()
    except Exception as error:  # kernels may raise anything on an untested machine
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Measured(float("inf"), loss, f"{type(error).__name__}: {error}")
    return Measured(sorted(seconds[1:])[N_TIMED // 2], loss, None)


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
