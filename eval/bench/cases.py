"""Cases of the training-step benchmark; each row of its results compares several cases in one setting."""

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
"""Values shared by all cases of a row: sizes, device, share of dead latents and whether the weights are trained."""


class Case(NamedTuple):
    """A training step to compare with others."""

    name: str
    """Name in results and on pages."""
    fields: dict[str, Any]
    """Config fields besides those of the setting."""
    config: type[TrainingSAEConfig] = SampledTopKTrainingSAEConfig
    way: str = ""
    """The way that the step is forced to; empty to let the SAE choose."""
    package: str = ""
    """Optional package whose own training step is used; empty: SAELens' trainer."""


BATCHTOPK = Case("SAELens BatchTopK", {}, BatchTopKTrainingSAEConfig)
TOPK = Case("SAELens TopK", {}, TopKTrainingSAEConfig)
ALL_LATENTS = Case("all latents", {"pool_factor": None})
DICTIONARY_LEARNING = Case("dictionary_learning BatchTopK", {}, package="dictionary-learning")
SPARSIFY = Case("sparsify TopK", {}, package="eai-sparsify")
OTHER_PACKAGES = (DICTIONARY_LEARNING.package, SPARSIFY.package)
NOT_ALIKE = {
    BATCHTOPK.name: "on average k per token over the batch, ranked by activation times decoder norm",
    TOPK.name: "k per token, ranked by activation times decoder norm",
    "SAELens Matryoshka": "like BatchTopK, decoded at four widths",
    DICTIONARY_LEARNING.name: (
        "on average k per token over the batch, ranked by activation alone; decoder rows are rescaled to norm 1; "
        "counts dead latents itself"
    ),
    SPARSIFY.name: (
        "k per token, since it has no BatchTopK, ranked by activation alone; decoder rows are rescaled to norm 1; "
        "the loss is FVU; clipping and Adam are not its own"
    ),
    ALL_LATENTS.name: "like BatchTopK, with the same selection",
}
"""How the libraries' steps differ from each other, by case name."""
WAYS_OF_ONE_POOL: dict[str, StepPath] = {"columns": "columns", "entries": "kept"}
"""Step paths of a single pool, by way; no config field selects between them."""


def matryoshka(widths: list[int]) -> Case:
    return Case("SAELens Matryoshka", {"matryoshka_widths": widths}, MatryoshkaBatchTopKTrainingSAEConfig)


def one_pool(factor: float) -> Case:
    return Case(f"one pool, factor {factor:g}", {"pool_factor": factor})


def groups(factor: float) -> Case:
    return Case(f"groups of 16, factor {factor:g}", {"pool_factor": factor, "pool_group_size": 16})


def nested(case: Case, widths: list[int]) -> Case:
    return case._replace(name=f"nested {case.name}", fields=case.fields | {"matryoshka_widths": widths})


def forced(case: Case, way: str) -> Case:
    """The case with its step forced to a given way."""
    step = "kept" if way in WAYS_OF_ONE_POOL else way
    return case._replace(name=f"{case.name} ({way})", fields=case.fields | {"step": step}, way=way)


def sae_config(case: Case, setting: Setting) -> TrainingSAEConfig:
    shared = {name: setting[name] for name in ("d_in", "d_sae", "k", "device")}
    return case.config(**shared, aux_loss_coefficient=1 / 32, **case.fields)


def plan(device: str, quick: bool = False) -> dict[str, list[tuple[Setting, list[Case]]]]:
    """Rows to measure, by section. The limits of `choose_path` come from the sections named crossing_*."""
    base = {"device": device, "autocast": False, "trained": False, "dead": 0.0, "training_steps": TRAINING_STEPS}

    def kept(case: Case) -> Case:
        """The case, forced to "kept" on a GPU, where "auto" would take the path that it times as fastest."""
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
        # Each with and without the four levels of SAELens' Matryoshka.
        "nested": [
            (large | {"dead": d, "trained": True}, [*wide, *(nested(case, four) for case in fast[1:])])
            for d in (0.0, 0.25)
        ],
        # Arms of the study on SmolLM2, with about the shares of dead latents that they have there.
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
        "libraries": [
            (size | {"dead": dead}, libraries(size["d_sae"], dead)) for size in (large, small) for dead in (0.0, 0.25)
        ],
    }


def libraries(d_sae: int, dead: float) -> list[Case]:
    """A step in each library."""
    return [BATCHTOPK, TOPK, matryoshka(four_levels(d_sae)), *other_packages(dead), ALL_LATENTS]


def other_packages(dead: float) -> list[Case]:
    """Cases of other packages; there is none of dictionary_learning with dead latents.

    That trainer counts dead latents itself, and a latent that fires in a step no longer counts as dead in that step.
    """
    return [SPARSIFY] if dead else [DICTIONARY_LEARNING, SPARSIFY]


GPU_SIZES = {
    "16k": {"tokens": 4096, "d_in": 768, "d_sae": 16_384, "k": 64},
    "65k": {"tokens": 4096, "d_in": 2304, "d_sae": 65_536, "k": 64},
    "131k": {"tokens": 4096, "d_in": 4096, "d_sae": 131_072, "k": 64},
}
GPU_REPEATS = {"16k": 20, "65k": 6, "131k": 3}
PRECISIONS = {"float32": {}, "autocast": {"autocast": True}, "TF32": {"tf32": True}}
KEPT, DENSE = (forced(ALL_LATENTS, way) for way in ("kept", "dense"))


def gpu_plan(device: str, tiny: bool = False) -> dict[str, list[tuple[Setting, list[Case]]]]:
    """Rows to measure on a GPU, by section (sizes first), the most informative first in each.

    `tiny` shrinks the sizes and leaves out most rows, to check on any machine that the benchmark runs.
    """
    base = {"device": device, "autocast": False, "tf32": False, "trained": False, "training_steps": TRAINING_STEPS}
    sections: dict[str, list[tuple[Setting, list[Case]]]] = {}
    for name, size in GPU_SIZES.items():
        if tiny:
            size = size | {"tokens": 64, "d_in": 128, "d_sae": size["d_sae"] // 256, "k": 4}
        ways = [BATCHTOPK, KEPT, ALL_LATENTS]
        if name != "131k":  # memory allows fewer cases there
            ways += [DENSE, groups(10), one_pool(5), TOPK, matryoshka(four_levels(size["d_sae"]))]
        settings = [base | size | {"dead": dead} | fields for dead in (0.0, 0.25) for fields in PRECISIONS.values()]
        if tiny:
            settings = settings[::4] if name == "16k" else settings[:1]
        # The other packages' steps have no autocast.
        sections[name] = [(s, ways if s["autocast"] else ways + other_packages(s["dead"])) for s in settings]
        if name == "16k" and not tiny:  # after some training, fewer entries exceed the bound
            sections[name] += [(s | {"trained": True}, ways) for s in settings if not s["tf32"]]
    sections["without_triton"] = [(s, [BATCHTOPK, KEPT]) for s, _ in sections["16k"][:2] + sections["65k"][:2]]
    return sections


def four_levels(d_sae: int) -> list[int]:
    return [d_sae // 64, d_sae // 16, d_sae // 4, d_sae]
