"""Which way a training step takes where only measuring tells: on a GPU, of a kind that nobody has timed."""

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
"""On others the constants of `kept_entries.py` decide."""
AGAIN_AFTER_STEPS = 100
"""Steps after which is measured once more: some 1.3 entries per kept one exceed the bound then, and 4 at first."""
DEAD_SHARE = 0.1
"""Share of dead latents from which on is measured once more: AuxK costs the dense step more."""
TOLERANCE, TOLERANCE_UNDER_AUTOCAST = 1e-5, 1e-2
"""How far the losses of two ways may lie apart, as a share of the loss."""
N_TIMED = 3
"""Forward and backward passes that are timed, after one that is not."""
VARIABLE = "SAE_LENS_SAMPLED_STEP"
"""Environment variable that stands in for `step="auto"`."""


class PathChoice(nn.Module):
    """The way that was measured to be the fastest, and when to measure again. A checkpoint holds it."""

    record: Tensor
    """The path's place in `StepPath` from 1 on (0: not measured), the number of tokens, whether it was measured after
    `AGAIN_AFTER_STEPS`, and with many dead latents; int64, shape (4,)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("record", torch.zeros(4, dtype=torch.int64, device=device))
        self._known: list[int] | None = None  # the record, read from the device once

    def is_due(self, n_tokens: int, n_steps: int, dead_share: float) -> bool:
        """Whether to measure at this step."""
        path, tokens, late, dead = self._read()
        again = not late and n_steps >= AGAIN_AFTER_STEPS
        return path == 0 or tokens != n_tokens or again or (not dead and dead_share > DEAD_SHARE)

    @property
    def path(self) -> StepPath:
        """The way that was chosen last."""
        return get_args(StepPath)[self._read()[0] - 1]

    def remember(self, path: StepPath, n_tokens: int, n_steps: int, dead_share: float) -> None:
        """The choice of a measurement at this step."""
        place = 1 + get_args(StepPath).index(path)
        self._known = [place, n_tokens, int(n_steps >= AGAIN_AFTER_STEPS), int(dead_share > DEAD_SHARE)]
        self.record.copy_(torch.tensor(self._known))

    def forget(self) -> None:
        """Measure anew: what was measured was another step's."""
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
    """`step`, or what the environment says in place of "auto".

    Raises:
        ValueError: if that is no step.
    """
    if step != "auto" or not (wanted := os.environ.get(VARIABLE, "").strip()):
        return step
    if wanted not in get_args(Step):
        raise ValueError(f"{VARIABLE}={wanted!r} must be one of {', '.join(get_args(Step))}.")
    return wanted  # type: ignore[return-value]


class Measured(NamedTuple):
    """One way to compute a step."""

    seconds: float
    """Median of forward and backward; infinite if the way failed."""
    loss: float
    failure: str | None


def fastest_path(
    loss_by: Callable[[StepPath], Tensor], paths: Sequence[StepPath], parameters: list[nn.Parameter], ranks: Ranks
) -> StepPath:
    """The way whose forward and backward pass took the least time; a line in the log says how much each took.

    A way that fails, has no memory, or has another loss than the dense one is left, with a warning that names it.

    Args:
        loss_by: computes the loss of this batch by a path, and changes nothing.
        paths: the ways that there are, the dense one among them.
        parameters: whose gradients are formed.
        ranks: the processes, which decide alike: by the slowest of them.
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
            warnings.warn(f"training steps do not take the path {path!r}: {failure}", stacklevel=2)
        seconds[path] = own
    slowest = ranks.max(torch.tensor(list(seconds.values()), dtype=torch.float64, device=device)).tolist()
    times = dict(zip(seconds, slowest, strict=True))
    fastest = min(times, key=lambda path: times[path])
    if times[fastest] == float("inf"):
        fastest = "dense"  # whose error is then the run's
    shown = ", ".join(f"{1000 * own:,.2f} ms by {path!r}" for path, own in times.items())
    logger.info(f"sampled_topk: forward and backward take {shown}; steps take the path {fastest!r} from here on")
    return fastest


def measure(loss_of: Callable[[], Tensor], parameters: list[nn.Parameter], device: torch.device) -> Measured:
    """Time a way to compute a step, after one pass that compiles and fills caches."""
    seconds, loss = [], float("nan")
    try:
        for _ in range(1 + N_TIMED):
            start = now(device)
            value = loss_of()
            torch.autograd.grad(value, parameters, allow_unused=True)
            seconds.append(now(device) - start)
            loss = value.item()
    except Exception as error:  # whatever a kernel raises on a machine that nobody has seen
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Measured(float("inf"), loss, f"{type(error).__name__}: {error}")
    return Measured(sorted(seconds[1:])[N_TIMED // 2], loss, None)


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
