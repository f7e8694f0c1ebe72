"""Checks of the evals asked for and of the fields that users override in SAEBench's configurations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sae_lens_sampled.saebench.evals import EVALS


def check_evals(evals: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Check names of evals, and names and numbers of the fields that `overrides` sets in their configurations.

    Raises:
        ValueError: if no eval is named, a name is unknown, `overrides` has an eval that is not in `evals`, a field is
            an argument of `run_evals`, or a number is out of range.
    """
    if not evals or not set(evals) <= EVALS.keys():
        raise ValueError(f"evals={list(evals)} must be one or more of {list(EVALS)}.")
    if unknown := sorted(overrides.keys() - EVALS.keys()):
        raise ValueError(f"overrides (--set) has {unknown[0]!r}, which is not an eval; use one of {list(EVALS)}.")
    arguments = {"model_name": "model", "llm_dtype": "dtype", "dataset": "text"}
    for name, settings in overrides.items():
        known = sorted(field.name for field in fields(EVALS[name].config_class))
        for field in settings:
            if field in arguments:
                raise ValueError(f"overrides[{name!r}] sets {field!r}; pass {arguments[field]}=... instead.")
            if field not in known:
                raise ValueError(
                    f"overrides[{name!r}] sets {field!r}, which is not among the fields of its configuration: "
                    f"{sorted(known)}."
                )
        _check_numbers(name, settings)
        if name not in evals:
            raise ValueError(
                f"overrides (--set) has {name!r}, which is not among evals={list(evals)}; add it there or leave it out."
            )


def _check_numbers(eval_name: str, settings: Mapping[str, Any]) -> None:
    """Reject sizes and counts that are not positive integers, or lists of these, and numbers that are not finite.

    Other fields, such as seeds and token positions, are not checked.
    """
    defaults = asdict(EVALS[eval_name].config_class(model_name=""))
    for field, value in settings.items():
        usual = defaults[field]
        is_count = isinstance(usual, int) and not isinstance(usual, bool) and usual > 0 and "seed" not in field
        is_count |= usual is None and field.endswith("batch_size")
        if is_count and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise ValueError(f"{eval_name}.{field}={value!r} must be a positive integer.")
        is_list = isinstance(usual, list) and all(isinstance(n, int) for n in usual)
        if is_list and not (isinstance(value, list) and value and all(isinstance(n, int) and n > 0 for n in value)):
            raise ValueError(f"{eval_name}.{field}={value!r} must be a list of positive integers.")
        if isinstance(usual, float) and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{eval_name}.{field}={value!r} must be a finite number.")
