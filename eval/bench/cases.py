"""What the benchmark of a training step measures: cases beside each other, in rows of one setting."""

from typing import Any, NamedTuple

from sae_lens import BatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.kept_entries import StepPath

SIZES = {
    "large": {"tokens": 2048, "d_in": 768, "d_sae": 16_384, "k": 64},
    "small": {"tokens": 2048, "d_in": 256, "d_sae": 8192, "k": 32},
    "smollm2": {"tokens": 2048, "d_in": 576, "d_sae": 4096, "k": 32},
}
TRAINING_STEPS = 200
Setting = dict[str, Any]
"""What all cases of a row have in common: sizes, device, share of dead latents and whether the weights are trained."""


class Case(NamedTuple):
    """A training step that is measured beside others."""

    name: str
    """How results and pages call it."""
    fields: dict[str, Any]
    """Fields of its config, besides those of the setting."""
    config: type[TrainingSAEConfig] = SampledTopKTrainingSAEConfig
    way: str = ""
    """How the step is done, where the ways are compared; empty where the SAE chooses."""


BATCHTOPK = Case("SAELens BatchTopK", {}, BatchTopKTrainingSAEConfig)
TOPK = Case("SAELens TopK", {}, TopKTrainingSAEConfig)
ALL_LATENTS = Case("all latents", {"pool_factor": None})
WAYS_OF_ONE_POOL: dict[str, StepPath] = {"columns": "columns", "entries": "kept"}
"""Paths of a step between which no config chooses."""


def matryoshka(widths: list[int]) -> Case:
    return Case("SAELens Matryoshka", {"matryoshka_widths": widths}, MatryoshkaBatchTopKTrainingSAEConfig)


def one_pool(factor: float) -> Case:
    return Case(f"one pool, factor {factor:g}", {"pool_factor": factor})


def groups(factor: float) -> Case:
    return Case(f"groups of 16, factor {factor:g}", {"pool_factor": factor, "pool_group_size": 16})


def nested(case: Case, widths: list[int]) -> Case:
    return case._replace(name=f"nested {case.name}", fields=case.fields | {"matryoshka_widths": widths})


def forced(case: Case, way: str) -> Case:
    """A case whose step is done in a given way."""
    step = "kept" if way in WAYS_OF_ONE_POOL else way
    return case._replace(name=f"{case.name} ({way})", fields=case.fields | {"step": step}, way=way)


def sae_config(case: Case, setting: Setting) -> TrainingSAEConfig:
    shared = {name: setting[name] for name in ("d_in", "d_sae", "k", "device")}
    return case.config(**shared, aux_loss_coefficient=1 / 32, **case.fields)


def plan(device: str, quick: bool = False) -> dict[str, list[tuple[Setting, list[Case]]]]:
    """What is measured: rows of every section. `choose_path` goes by the sections named crossing_*."""
    base = {"device": device, "autocast": False, "trained": False, "dead": 0.0, "training_steps": TRAINING_STEPS}

    def kept(case: Case) -> Case:
        """On a GPU "auto" runs most pools dense."""
        return forced(case, "kept") if device.startswith("cuda") else case

    all_latents, in_groups, one = kept(ALL_LATENTS), kept(groups(10)), one_pool(5)
    fast = [BATCHTOPK, all_latents, in_groups, one]

    def with_matryoshka(d_sae: int) -> list[Case]:
        return [BATCHTOPK, matryoshka(four_levels(d_sae)), *fast[1:]]

    if quick:
        tiny = base | {"tokens": 256, "d_in": 128, "d_sae": 2048, "k": 8, "training_steps": 5}
        return {"large": [(tiny | {"trained": trained}, with_matryoshka(2048)) for trained in (False, True)]}
    large, small, smollm2 = base | SIZES["large"], base | SIZES["small"], base | SIZES["smollm2"] | {"trained": True}
    wide, four, levels = with_matryoshka(large["d_sae"]), four_levels(large["d_sae"]), [256, 1024, 4096]
    earlier = [kept(groups(4)), one_pool(4)]
    earlier.append(Case("sampled pool, factor 4", {"pool_factor": 4, "pool_sampling": "proportional"}))
    in_study = [kept(groups(factor)) for factor in (5, 10, 20)]
    in_study += [nested(kept(groups(factor)), levels) for factor in (10, 20)]
    states = [(trained, dead) for trained in (False, True) for dead in (0.0, 0.25, 0.9)]
    kept_or_dense = [forced(ALL_LATENTS, way) for way in ("kept", "dense")]
    return {
        "large": [(large | {"dead": d, "trained": t}, fast if d else wide) for t, d in states],
        "small": [(small | {"dead": d, "trained": t}, [*with_matryoshka(small["d_sae"]), *earlier]) for t, d in states],
        # Each with the four levels of SAELens' Matryoshka, and without.
        "nested": [
            (large | {"dead": d, "trained": True}, [*wide, *(nested(case, four) for case in fast[1:])])
            for d in (0.0, 0.25)
        ],
        # The arms of the study on SmolLM2, with about as many dead latents as they have.
        "smollm2": [
            (smollm2 | {"dead": 0.1}, [BATCHTOPK, TOPK, matryoshka(levels), all_latents, *in_study]),
            (smollm2 | {"dead": 0.9}, [BATCHTOPK, one]),
        ],
        "autocast": [(small | {"autocast": True, "dead": d}, fast) for d in (0.0, 0.25, 0.9)],
        "d_sae": [(small | {"d_sae": n}, fast) for n in (2048, 4096, 8192, 16_384, 32_768)],
        "crossing_density": [(small | {"d_sae": 4096, "k": k}, kept_or_dense) for k in (16, 64, 256, 512, 1024)],
        "crossing_size": [
            (small | {"d_in": 64, "d_sae": n, "k": 8, "tokens": 512}, kept_or_dense)
            for n in (128, 256, 512, 1024, 2048)
        ],
        "crossing_columns": [
            (small, [forced(one_pool(factor), way) for way in (*WAYS_OF_ONE_POOL, "dense")])
            for factor in (4, 16, 32, 64, 128, 200)
        ],
    }


def four_levels(d_sae: int) -> list[int]:
    return [d_sae // 64, d_sae // 16, d_sae // 4, d_sae]
