"""This process's rank and the number of processes, from the environment that torchrun sets; joining the others."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import typer

from sae_lens_sampled.devices import check_device
from sae_lens_sampled.step.ranks import GroupRanks, LostRankError

DEVICE_FIELDS = ("device", "llm_device", "act_store_device")
"""Fields of SAELens' runner config that name a device."""
TELL_SECONDS = 30.0
"""Seconds between two messages about waiting for other processes."""


def number_of_processes() -> int:
    """Number of processes that train together; 1 by default.

    Raises:
        ValueError: if WORLD_SIZE is not a number of processes.
    """
    return dist.get_world_size() if dist.is_initialized() else _from_environment("WORLD_SIZE", 1, lowest=1)


def rank_of_process() -> int:
    """Rank of this process, from 0.

    Raises:
        ValueError: if RANK is not a rank below the number of processes, or WORLD_SIZE is not a number of processes.
    """
    rank, count = _from_environment("RANK", 0), number_of_processes()
    if rank >= count:
        raise ValueError(
            f"RANK={rank} in the environment is not below WORLD_SIZE={count}: ranks start at 0. torchrun sets both."
        )
    return rank


def own_device(device: str) -> str:
    """`device`, or this process's own GPU if it is "cuda" and there are several processes.

    Raises:
        ValueError: if several processes cannot train on `device` or cannot share it, or WORLD_SIZE or LOCAL_RANK is not
            a number.
    """
    if number_of_processes() == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(
            f"{device!r} cannot be used by several processes; set device, llm_device and act_store_device to 'cpu' or "
            "'cuda', which gives each process on a machine its own GPU."
        )
    return f"cuda:{_from_environment('LOCAL_RANK', 0)}"


def check_own_devices(cfg: Any) -> None:
    """Reject devices of a runner's config that this process cannot use, before anything is loaded.

    Raises:
        ValueError: as `own_device`, or naming the field, its device and the devices of this machine.
    """
    for name in DEVICE_FIELDS:
        check_device(own_device(getattr(cfg, name)), name)


def join_processes(device: str, timeout: timedelta) -> GroupRanks:
    """Join all processes in a group that exchanges CPU tensors; torch's default group exchanges those on `device`.

    They find each other through the environment set by torchrun, unless they already have. While others are missing, a
    message on stderr says so every `TELL_SECONDS`.

    Args:
        device: device of this process, from `own_device`.
        timeout: how long a process waits for the others in an exchange before it gives up.

    Raises:
        ValueError: if the device is unavailable, or the environment does not say which process this is and where the
            others are.
        LostRankError: if the others do not join in time.
    """
    check_device(device)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _check_environment()
        with _reporting_waits():
            dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", timeout=timeout)
    on_cpu = dist.new_group(timeout=timeout, backend="gloo")
    assert isinstance(on_cpu, dist.ProcessGroup)  # of all processes, so this one is in it
    return GroupRanks(on_cpu)


def leave_processes() -> None:
    """Undo `join_processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _reporting_waits() -> Iterator[None]:
    """Reports from time to time which processes this one is still waiting for, and at which address."""
    rank, count, joined = rank_of_process(), number_of_processes(), threading.Event()
    others = "the other process" if count == 2 else f"the {count - 1} other processes"
    where = f"MASTER_ADDR:MASTER_PORT={os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    started = time.monotonic()

    def tell() -> None:
        while not joined.wait(TELL_SECONDS):
            typer.echo(
                f"process {rank} of {count} has waited {time.monotonic() - started:.0f} s for {others} at {where}; "
                "each must be started with this address and its own RANK.",
                err=True,
            )

    thread = threading.Thread(target=tell, name="waiting for other processes", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"process {rank} of {count} could not join {others} at {where}; start each with this address, whose port "
            f"must be free, and its own RANK. ({error})"
        ) from error
    finally:
        joined.set()
        thread.join()


def _check_environment() -> None:
    """Reject an environment that does not say which process this is and where the others are.

    Raises:
        ValueError: naming the missing variables, or the one with an invalid value.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={number_of_processes()} is set in the environment, but not {', '.join(missing)}: start with "
            "torchrun, which sets them, or unset WORLD_SIZE to train on one process."
        )
    rank_of_process()
    _from_environment("MASTER_PORT", 0)


def _from_environment(name: str, default: int, lowest: int = 0) -> int:
    """A whole number from the environment; an empty variable counts as unset."""
    value = os.environ.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal() or int(value) < lowest:
        raise ValueError(
            f"{name}={value!r} in the environment must be a whole number of at least {lowest}; torchrun sets it. To "
            "train on one process, unset the variables that torchrun sets (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_PORT)."
        )
    return int(value)
