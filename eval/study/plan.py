"""Which SAEs a study trains and evaluates, and in which runs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import combinations_with_replacement
from typing import Any

from sae_lens import BatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_sampled import SampledTopKTrainingSAEConfig
from study.configs import Study

BASE = "batchtopk"
"""The arm that the others are compared with."""
GROUPED = 16
"""Group size of the arms that vary something else."""
NARROW = (3, 5)
"""Pool factors with a control: a BatchTopK SAE of the pool's size, to show the effect of having few latents."""
NESTED = {"nested_10": 10, "nested_20": 20}
"""Pool factors of the arms with nested losses in groups."""
THEN_PLAIN = "nested_10_then_plain"
"""The arm whose inner losses count only in the first half of training."""
GROUPS_10 = "pool_10_groups_16"
"""Pools of ten times k latents for groups of tokens."""
THEN_ALL = "pool_10_groups_16_then_all"
"""The same arm, with every latent a candidate in the last tenth of the training."""
WINSORISED = "winsorised_10_groups_16_then_all"
"""The arm with the setting that finds the most of few known features; it too ends with every latent a candidate."""
ITSELF = (THEN_PLAIN, GROUPS_10, THEN_ALL, WINSORISED)
"""Arms that, like those of `NESTED`, are compared only with themselves, between seeds."""
FROZEN, SHORT = "frozen_decoder", "short"
"""Controls."""


@dataclass(frozen=True)
class Arm:
    """One configuration, trained with several seeds."""

    name: str
    label: str
    config: type[TrainingSAEConfig]
    n_seeds: int
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of `config` besides those that all arms share."""
    shuffled: bool = True
    """Whether a batch has shuffled tokens from many prompts, not consecutive tokens from a few."""
    frozen_decoder: bool = False
    """Whether the decoder keeps its random initialisation; encoder and biases are trained."""
    steps_share: float = 1.0
    """Share of the study's steps that the arm is trained for, with its own schedule."""
    width_over_k: float | None = None
    """d_sae over k, if d_sae is not the study's: the pool factor at which one pool has as many latents."""
    exported_from: str | None = None
    """Name of the arm whose SAEs are exported, with a global threshold at L0 k instead of their own thresholds."""


@dataclass(frozen=True)
class Unit:
    """One SAE of an arm."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Name of the SAE; `run_evals` takes names that differ only in the seed for seeds of one configuration."""
        return f"{self.arm.name}_seed{self.seed}"

    @property
    def trained(self) -> str:
        """Name of the trained SAE that this one is exported from."""
        return f"{self.arm.exported_from or self.arm.name}_seed{self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        """Key of the SAE's results."""
        return self.arm.name, self.seed


def arms(study: Study) -> list[Arm]:
    """All arms of the study, the most important first."""
    sampled, n, more = SampledTopKTrainingSAEConfig, study.n_seeds, study.n_stability_seeds
    fixed, widths = study.fixed_pool_factor, nested_widths(study.d_sae)
    plan = [
        Arm("batchtopk", "BatchTopK", BatchTopKTrainingSAEConfig, more),
        Arm("topk", "TopK", TopKTrainingSAEConfig, n),
        Arm(
            "matryoshka",
            "Matryoshka BatchTopK",
            MatryoshkaBatchTopKTrainingSAEConfig,
            n,
            {"matryoshka_widths": widths},
        ),
    ]
    for name, factor in NESTED.items():
        fields = {"matryoshka_widths": widths, "pool_factor": factor, "pool_group_size": GROUPED}
        plan.append(Arm(name, f"nested, {pool_label(factor, GROUPED)}", sampled, n, fields))
    fields = {"matryoshka_widths": widths, "pool_factor": 10, "pool_group_size": GROUPED}
    label = f"nested, {pool_label(10, GROUPED)}, then plain"
    plan.append(Arm(THEN_PLAIN, label, sampled, n, fields | {"inner_loss_steps": study.steps // 2}))
    fields = {"pool_factor": 10, "pool_group_size": GROUPED, "pool_steps": round(0.9 * study.steps)}
    label = pool_label(10, GROUPED) + ", then all"
    plan.append(Arm(THEN_ALL, label, sampled, n, fields))
    plan.append(Arm(WINSORISED, f"winsorised, {label}", sampled, n, fields | {"score": "winsorised"}))
    if study.controls:
        plan.append(Arm(FROZEN, "BatchTopK, random decoder", BatchTopKTrainingSAEConfig, n, frozen_decoder=True))
        plan.append(Arm(SHORT, "BatchTopK, a tenth of the steps", BatchTopKTrainingSAEConfig, n, steps_share=0.1))
    for factor in NARROW:
        label = f"BatchTopK as wide as pool {factor:g}"
        plan.append(Arm(narrow_name(factor), label, BatchTopKTrainingSAEConfig, n, width_over_k=factor))
    for factor in study.pool_factors:
        for size in (None, *study.group_sizes):
            stable = factor == fixed and size in (None, GROUPED)
            fields = {"pool_factor": factor, "pool_group_size": size}
            plan.append(Arm(pool_name(factor, size), pool_label(factor, size), sampled, more if stable else n, fields))
    plan.append(Arm("pool_all", "pool of all latents", sampled, n, {"pool_factor": study.d_sae / study.k}))
    for size in (None, GROUPED):
        for score in study.scores:
            fields = {"score": score, "pool_factor": fixed, "pool_group_size": size}
            if score in study.sampled_scores:
                fields["pool_sampling"] = "proportional"
            label = f"{score}, " + pool_label(fixed, size)
            plan.append(Arm(score_name(score, size), label, sampled, n, fields))
    fields = {"pool_factor": fixed, "pool_group_size": GROUPED}
    plan.append(
        Arm("consecutive_batchtopk", "BatchTopK, consecutive tokens", BatchTopKTrainingSAEConfig, n, shuffled=False)
    )
    label = pool_label(fixed, GROUPED) + ", consecutive tokens"
    plan.append(Arm("consecutive_groups", label, sampled, n, fields, shuffled=False))
    by_name = {arm.name: arm for arm in plan}
    for factor, size in ((1.5, None), (3, None), (fixed, None), (fixed, GROUPED)):
        if (source := by_name.get(pool_name(factor, size))) is not None:
            label = f"{source.label}, global threshold at L0 {study.k:g}"
            plan.append(Arm(f"{source.name}_global", label, sampled, n, source.fields, exported_from=source.name))
    plan = [replace(arm, n_seeds=study.seeds_by_arm.get(arm.name, arm.n_seeds)) for arm in plan]
    return [arm for arm in plan if any(fnmatch(arm.name, pattern) for pattern in study.arms)]


def check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    """Reject a pattern of `--arms` that matches no arm: a wanted arm would be left out silently.

    Raises:
        ValueError: if a pattern matches none of `names`; the message lists all arms.
    """
    known = list(dict.fromkeys(names))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise ValueError(f"--arms {pattern} matches no arm; available: {', '.join(known)}.")


def nested_widths(d_sae: int) -> list[int]:
    """Widths of the levels of Matryoshka and of nested pools."""
    return [d_sae // 16, d_sae // 4, d_sae]


def pool_name(factor: float, size: int | None) -> str:
    return f"pool_{factor:g}" + ("" if size is None else f"_groups_{size}")


def pool_label(factor: float, size: int | None) -> str:
    return f"pool {factor:g}, " + ("one pool" if size is None else f"groups of {size}")


def narrow_name(factor: float) -> str:
    return f"narrow_{factor:g}"


def score_name(score: str, size: int | None) -> str:
    return score + ("" if size is None else f"_groups_{size}")


def width(arm: Arm, k: float, d_sae: int) -> int:
    """Number of the arm's latents in a study whose d_sae is `d_sae`."""
    if arm.width_over_k is None:
        return d_sae
    return SampledTopKTrainingSAEConfig(d_in=2, d_sae=d_sae, k=k, pool_factor=arm.width_over_k).n_candidates


def sae_config(study: Study, arm: Arm, seed: int) -> TrainingSAEConfig:
    """The arm's config on the language model."""
    return _config(study, arm, seed, {"d_in": study.d_in, "d_sae": study.d_sae, "k": study.k}, arm.fields)


def synthetic_config(study: Study, arm: Arm, seed: int) -> TrainingSAEConfig:
    """The arm's config on synthetic data, with the pool factors of the language model, except `pool_all`."""
    synthetic, fields = study.synthetic, dict(arm.fields)
    if "matryoshka_widths" in fields:
        fields["matryoshka_widths"] = nested_widths(synthetic.d_sae)
    if arm.name == "pool_all":
        fields["pool_factor"] = synthetic.d_sae / synthetic.k
    for name in ("inner_loss_steps", "pool_steps"):
        if name in fields:
            fields[name] = round(fields[name] * synthetic.steps / study.steps)
    sizes = {"d_in": synthetic.data.hidden_dim, "d_sae": synthetic.d_sae, "k": synthetic.k}
    return _config(study, arm, seed, sizes, fields)


def trained_config(study: Study, arm: Arm, seed: int) -> TrainingSAEConfig:
    """The config to train with: the arm's own, or one with the same selection by this package's step."""
    config = sae_config(study, arm, seed)
    if not study.own_steps or isinstance(config, SampledTopKTrainingSAEConfig):
        return config
    shared = ("d_in", "d_sae", "k", "device", "aux_loss_coefficient")
    given = {name: getattr(config, name) for name in shared} | {"inference_threshold": "global", "pool_factor": None}
    if isinstance(config, TopKTrainingSAEConfig) and not isinstance(config, BatchTopKTrainingSAEConfig):
        given |= {"pool_factor": 1, "pool_group_size": 1}
    if isinstance(config, MatryoshkaBatchTopKTrainingSAEConfig):
        given["matryoshka_widths"] = config.matryoshka_widths
    return SampledTopKTrainingSAEConfig(**given)


def _config(study: Study, arm: Arm, seed: int, sizes: dict[str, Any], fields: dict[str, Any]) -> TrainingSAEConfig:
    d_sae = width(arm, sizes["k"], sizes["d_sae"])
    given = sizes | {"d_sae": d_sae, "device": study.device, "aux_loss_coefficient": study.aux_loss_coefficient}
    if arm.config is SampledTopKTrainingSAEConfig:
        given["pool_seed"] = seed
    return arm.config(**given, **fields)


def units(study: Study) -> list[Unit]:
    """Every SAE that is evaluated."""
    return [Unit(arm, seed) for arm in arms(study) for seed in study.seeds(arm.n_seeds)]


def absorption_units(study: Study) -> list[Unit]:
    """The SAEs that the stage `absorption` evaluates."""
    if not study.absorption:
        return []
    seeds = study.seeds(study.absorption_seeds)
    return [unit for unit in units(study) if unit.arm.name in study.absorption_arms and unit.seed in seeds]


def synthetic_units(study: Study) -> list[Unit]:
    """Every SAE on synthetic data.

    Without arms with consecutive tokens, because these data have no order, and without arms that only export the SAEs
    of another one.
    """
    return [
        Unit(arm, seed)
        for arm in arms(study)
        if study.on_synthetic_data and arm.shuffled and arm.exported_from is None
        for seed in study.seeds(study.n_seeds)
    ]


def runs(study: Study) -> list[list[Unit]]:
    """The SAEs to train, by run; SAEs of one seed see the same activations, whichever run they are in."""
    seeds: dict[tuple[int, bool, float], list[Unit]] = {}
    for unit in units(study):
        if unit.arm.exported_from is None:
            seeds.setdefault((unit.seed, not unit.arm.shuffled, -unit.arm.steps_share), []).append(unit)
    n = study.saes_per_run
    return [seeds[key][start : start + n] for key in sorted(seeds) for start in range(0, len(seeds[key]), n)]


def sweep(study: Study) -> list[Arm]:
    """Every pool factor with every group size, then the pool of all latents."""
    names = [pool_name(factor, size) for size in (None, *study.group_sizes) for factor in study.pool_factors]
    by_name = {arm.name: arm for arm in arms(study)}
    return [by_name[name] for name in [*names, "pool_all"] if name in by_name]


def compared(study: Study) -> Iterator[tuple[Arm, Arm]]:
    """The pairs of arms whose dictionaries are compared, including each of these arms with itself."""
    fixed = study.fixed_pool_factor
    names = ["batchtopk", "topk", "matryoshka", *(narrow_name(factor) for factor in NARROW)]
    names += [pool_name(fixed, size) for size in (None, GROUPED)]
    names += [score_name(score, size) for size in (None, GROUPED) for score in study.scores]
    by_name = {arm.name: arm for arm in arms(study)}
    yield from combinations_with_replacement([by_name[name] for name in names if name in by_name], 2)
    yield from ((by_name[name], by_name[name]) for name in (*NESTED, *ITSELF) if name in by_name)
