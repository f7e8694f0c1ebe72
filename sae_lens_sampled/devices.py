"""Devices that torch can use on this machine."""

import torch


class NoDeviceError(ValueError):
    """A device is not on this machine; the message says which are."""


def available_devices() -> list[str]:
    """Their names, as torch takes them."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_device(device: str, argument: str = "device") -> None:
    """Refuse a device that is not here, before anything fails on it in words of its own.

    Raises:
        NoDeviceError: with the devices that are.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        here = ", ".join(available_devices())
        raise NoDeviceError(f"there is no {argument}={device!r} on this machine; it has {here}.") from error
