"""Triton's interpreter, made faster, with its memory accesses watched; importing this needs TRITON_INTERPRET=1."""

import os

import pytest
import torch
from triton.runtime import interpreter

assert os.environ["TRITON_INTERPRET"] == "1", "without it kernels need a GPU"

# Triton patches `triton.language` at every launch, and again in every call of a function by the kernel. Once for each
# module of such functions is enough, and takes a third less time.
_patched = set()
_launch, _patch = interpreter.GridExecutor.__call__, interpreter._patch_lang


def launch(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def call(self, *args, **kwargs):
    if id(self.fn.__globals__) not in _patched:
        _patch(self.fn)
        _patched.add(id(self.fn.__globals__))
    return self.rewrite()(*args, **kwargs)


interpreter.GridExecutor.__call__ = launch
interpreter.InterpretedFunction.__call__ = call


def extent(x):
    """Number of entries that the memory of a tensor or view spans."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


class Memory:
    """Wraps the interpreter's memory: addresses outside the given tensors are recorded and masked out."""

    def __init__(self, real, tensors):
        self.real, self.places = real, set()
        self.ranges = [(t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()) for t in tensors]

    def __getattr__(self, name):
        return getattr(self.real, name)

    def _far(self, pointers, mask):
        far = mask.copy()
        for start, end in self.ranges:
            far &= ~((pointers >= start) & (pointers < end))
        self.places |= set(pointers[far].tolist())
        return far

    def load(self, pointers, mask, other, dtype):
        return self.real.load(pointers, mask & ~self._far(pointers, mask), other, dtype)

    def store(self, pointers, value, mask):
        self.real.store(pointers, value, mask & ~self._far(pointers, mask))


def places_outside(kernel, grid, arguments, tensors):
    """Addresses outside `tensors` that a launch reads or writes."""
    memory = Memory(interpreter._interpreter, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        kernel[grid](*arguments)
    return memory.places


def places_of(kernel, arguments, base, n_programs=1):
    """Offsets from the start of `base`, in entries, of what the kernel reads or writes outside its other arguments."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.data_ptr() != base.data_ptr()]
    places = places_outside(kernel, (n_programs,), arguments, tensors)
    return sorted((place - base.data_ptr()) // base.element_size() for place in places)


def watched_launch(kernel, grid, _device, *arguments):
    """As `launch`, but fails if anything outside the arguments is written, or read (which may crash a GPU process)."""
    if 0 not in grid:
        places = places_outside(kernel, grid, arguments, [x for x in arguments if isinstance(x, torch.Tensor)])
        assert not places, f"{kernel.__name__} reads or writes {len(places)} places outside its arguments"
