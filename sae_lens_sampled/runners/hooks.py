"""Hooks of a language model: when they run, which flags they need, and heads side by side."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FLAGS = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}
"""TransformerLens' flags without which a hook does not run, keyed by the end of the hook's name."""

EXCLUSIVE = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}
"""Flags that cannot be on together: HookedTransformer would ignore replacements at `hook_attn_in`."""

SPLIT_INTO_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")
"""Parts of names by which SAELens and SAEBench recognise hooks with heads."""


@torch.no_grad()
def one_pass(model: Any, tokens: Tensor, hook_names: Iterable[str], **model_kwargs: Any) -> dict[str, Tensor]:
    """Activations at some of the model's hooks, in the order in which these run; hooks that do not run are left out.

    The cache does not give that order: the bridge's cache also holds other names of these hooks, and lists them first.
    """
    names, calls = list(hook_names), []
    handles = [
        model.hook_dict[name].register_forward_hook(lambda *_, name=name: calls.append(name))
        for name in dict.fromkeys(names)
    ]
    try:
        # Bypasses `compile_llm`, which would compile for this shape too.
        cache = type(model).run_with_cache(model, tokens, names_filter=names, prepend_bos=False, **model_kwargs)[1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: cache[name] for name in dict.fromkeys(calls) if name in cache}


def is_one_place(model: Any, hook_name: str, other: str) -> bool:
    """Whether two names refer to the same hook: the bridge has several for most."""
    return model.hook_dict[hook_name] is model.hook_dict[other]


def flags_of(model: Any, hook_names: Iterable[str]) -> dict[str, str]:
    """Flags that must be on for these hooks, each with the first hook that needs it."""
    flags: dict[str, str] = {}
    for hook_name in hook_names:
        flag = next((flag for end, flag in FLAGS.items() if hook_name.endswith(end)), None)
        if flag is not None and hasattr(model, f"set_{flag}"):  # Hugging Face modules may be named alike
            flags.setdefault(flag, hook_name)
    return flags


def switch_on(model: Any, hook_names: Iterable[str]) -> list[str]:
    """Switch on the flags without which these hooks do not run; returns those that were off before.

    Raises:
        ValueError: if the model does not support a flag (with the model's reason), or two flags exclude each other.
    """
    flags = flags_of(model, hook_names)
    _check_exclusive(model, flags)
    were_off = [flag for flag in flags if not getattr(model.cfg, flag, False)]
    for flag in were_off:
        _set(model, flag, flags[flag])
    return were_off


def _check_exclusive(model: Any, flags: Mapping[str, str]) -> None:
    for flag, hook_name in flags.items():
        other = EXCLUSIVE.get(flag)
        if other is None:
            continue
        if other in flags:
            raise ValueError(
                f"{hook_name} needs {flag} and {flags[other]} needs {other}, which exclude each other; replace one of "
                "the two hooks."
            )
        if getattr(model.cfg, other, False):
            raise ValueError(
                f"{hook_name} needs {flag}, which excludes {other}, but the model has the latter on: "
                f"call set_{other}(False) on it first."
            )


def _set(model: Any, flag: str, hook_name: str) -> None:
    try:
        getattr(model, f"set_{flag}")(True)
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{hook_name} needs {flag}, which this model does not support; choose another hook. ({error})"
        ) from error


@contextmanager
def switched_on(model: Any, hook_names: Iterable[str]) -> Iterator[None]:
    """Switches on the flags that these hooks need; afterwards those that were off are switched off again.

    Flags change the last digits of activations and cost memory.

    Raises:
        ValueError: as `switch_on`.
    """
    were_off = switch_on(model, hook_names)
    try:
        yield
    finally:
        for flag in were_off:
            getattr(model, f"set_{flag}")(False)


def is_split(hook_name: str) -> bool:
    """Whether SAELens and SAEBench put the heads of this hook side by side themselves."""
    return any(part in hook_name for part in SPLIT_INTO_HEADS)


@contextmanager
def heads_side_by_side(model: Any, hook_names: Iterable[str]) -> Iterator[None]:
    """Makes these hooks read and write one row per token, with heads side by side, as in SAELens' store.

    SAELens' and SAEBench's evaluations do so themselves at hooks where `is_split` is true, and fail at other hooks with
    heads.
    """
    hooks = list({id(hook): hook for hook in (model.hook_dict[name] for name in hook_names)}.values())
    conversions = [getattr(hook, "hook_conversion", None) for hook in hooks]
    for hook, conversion in zip(hooks, conversions, strict=True):
        hook.hook_conversion = _SideBySide(conversion)
    try:
        yield
    finally:
        for hook, conversion in zip(hooks, conversions, strict=True):
            hook.hook_conversion = conversion


class _SideBySide:
    """A TransformerLens hook conversion that puts heads side by side; `own` is the one the hook already has."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.shape = torch.Size()
        """Shape of the activations converted last, with heads."""

    def convert(self, x: Any) -> Any:
        x = x if self.own is None else self.own.convert(x)
        if not isinstance(x, Tensor):
            return x
        self.shape = x.shape
        return x.flatten(start_dim=2) if x.ndim > 3 else x

    def revert(self, x: Any) -> Any:
        x = x.reshape(self.shape) if isinstance(x, Tensor) else x
        return x if self.own is None else self.own.revert(x)
