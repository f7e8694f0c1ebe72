"""Buffers that keep their dtype and every bit when their module is cast.

Counters and running means must not follow the weights to bfloat16, where a mean that moves by 1 % per step stands still
and a counter loses its last digits. Two things would cast them: `module.to(dtype)`, and SAELens' disk loader, which
casts every tensor of a file to the SAE's dtype (`read_sae_components_from_disk`).
"""

from typing import Any

import torch
from torch import Tensor, nn


def restore_buffers(module: nn.Module, originals: dict[str, Tensor]) -> None:
    """Undo a change of dtype in the buffers of `module`; a change of device is kept.

    Args:
        module: the module after the cast.
        originals: `dict(module.named_buffers())` from before the cast.
    """
    for name, original in originals.items():
        owner, _, leaf = name.rpartition(".")
        buffers = module.get_submodule(owner)._buffers
        cast = buffers[leaf]
        if cast is not None and cast.dtype != original.dtype:
            # There is nothing to copy from the meta device; only the dtype matters there.
            buffers[leaf] = cast.to(original.dtype) if original.is_meta else original.to(cast.device)


def pack_buffers(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Replace each buffer in `state_dict` by its bytes: numbers up to 255, exact even in bfloat16."""
    for name, _ in module.named_buffers():
        state_dict[name] = state_dict[name].reshape(-1).contiguous().view(torch.uint8)


ADDED_LATER = ("pool_record.input_norm", "path_choice.record")
"""Buffers missing from checkpoints of earlier versions; they are set to 0, as in an untrained SAE."""


def unpack_buffers(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Inverse of `pack_buffers`, also after `state_dict` was cast to another dtype.

    Raises:
        ValueError: if a buffer of `module`, other than `ADDED_LATER`, is missing or one has another size, as in another
            architecture's checkpoint.
    """
    for name, buffer in module.named_buffers():
        packed = state_dict.get(name)
        if packed is None and name in ADDED_LATER:
            state_dict[name] = torch.zeros_like(buffer, device="cpu")
            continue
        if packed is None or packed.numel() != buffer.numel() * buffer.element_size():
            found = "missing" if packed is None else f"{packed.numel()} bytes long"
            raise ValueError(
                f"this checkpoint does not fit the SAE: {name!r} is {found}, expected "
                f"{buffer.numel() * buffer.element_size()} bytes. The file holds {sorted(state_dict)[:4]} and so on; "
                "load a training checkpoint of this config: an SAE exported for inference cannot be trained further."
            )
        state_dict[name] = unpack(packed, buffer.dtype).view(buffer.shape)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of one buffer, shape (n,), from its bytes, which may have been cast to any dtype."""
    return packed.to(torch.uint8).view(dtype)
