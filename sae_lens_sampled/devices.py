"""Devices that torch can use on this machine."""

import torch


class NoDeviceError(ValueError):
    """A device is not available; the message lists those that are."""


def available_devices() -> list[str]:
    """Names of the CPU, CUDA and MPS devices that are available, as torch takes them."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_device(device: str, argument: str = "device") -> None:
    """Check that a device is available, before anything fails on it with a less clear message.

    Raises:
        NoDeviceError: if it is not, with the devices that are.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        here = ", ".join(available_devices())
        reason = str(error).partition("\n")[0]
        raise NoDeviceError(
            f"torch cannot use {argument}={device!r} on this machine; available: {here} ({reason})."
        ) from error
