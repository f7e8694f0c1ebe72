"""Which of how many processes this one is, as torchrun says it in the environment, and joining the others."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from sae_lens_sampled.ranks import GroupRanks


def number_of_processes() -> int:
    """How many processes train together; 1 where nothing says otherwise."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """`device`, or this process's own GPU where that is "cuda" and processes share a machine.

    Raises:
        ValueError: if `device` is one that several processes cannot train on, or cannot share.
    """
    if number_of_processes() == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(
            f"device={device!r}: several processes train on 'cpu', or on 'cuda', which gives each process of a machine "
            "a GPU of its own."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def join_processes(device: str, timeout: timedelta) -> tuple[GroupRanks, GroupRanks]:
    """All processes: to exchange what is on `device`, and to exchange what is on the CPU.

    They find each other by what torchrun has put into the environment, unless they have already.

    Args:
        device: of this process, of `own_device`.
        timeout: how long one waits for another in an exchange before it gives up.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", timeout=timeout)
    on_cpu = dist.new_group(timeout=timeout, backend="gloo")
    assert isinstance(on_cpu, dist.ProcessGroup)  # of all processes, so this one is in it
    return GroupRanks(), GroupRanks(on_cpu)


def leave_processes() -> None:
    """Undo `join_processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()
