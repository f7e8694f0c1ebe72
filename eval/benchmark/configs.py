"""The benchmarks on known features: data, arms, sizes."""

from dataclasses import replace

from sae_lens import BatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig, TopKTrainingSAEConfig

from benchmark.plan import Benchmark, BenchmarkArm, Data
from benchmark.recipes import PLAIN, RECIPE_16K, small_recipe
from benchmark.variants import VariantConfig
from sae_lens_sampled import SampledTopKTrainingSAEConfig

SAMPLED = SampledTopKTrainingSAEConfig
GROUPS = {"pool_factor": 10, "pool_group_size": 16}
HALF = 500
"""Half of the steps of `SMALL` and `TUNING`."""
SCHEDULED = GROUPS | {"first_pool_factor": 3.0, "moving_steps": HALF}
WINSORISED = {"score": "winsorised"}
WINSORISED_IN_GROUP = {"score": "winsorised_group_10"}
THEN_PLAIN = GROUPS | {"inner_loss_steps": HALF}
BATCHTOPK = {"pool_factor": None, "inference_threshold": "global"}
"""Our class as SAELens' BatchTopK: equal up to rounding, export included, at a fraction of the time."""
THEN_ALL = {"pool_steps": 0.9}
"""Every latent is a candidate in the last tenth of the steps, so that the export does what training did."""
THEN_ALL_ARMS = {
    "groups_then_all": BenchmarkArm("groups, then all latents", SAMPLED, GROUPS, steps=THEN_ALL),
    **{
        f"winsorised_{factor}_then_all": BenchmarkArm(
            f"groups, winsorised score, pool factor {factor}, then all latents",
            SAMPLED,
            GROUPS | WINSORISED | {"pool_factor": factor},
            steps=THEN_ALL,
        )
        for factor in (10, 20)
    },
}
"""Arms with pools until the last tenth of the steps."""


TWO = {"arms": ("batchtopk", "matryoshka"), "ks": (4,)}
INNER = [4, 16, 64]
"""Inner widths; d_sae is appended."""

SMALL = Benchmark(
    name="small",
    data={
        "features_42": Data("features of seed 42", small_recipe(42), 128),
        "features_43": Data("features of seed 43", small_recipe(43), 128),
        "wide": Data("the recipe", small_recipe(42), 256, **TWO),
        "plain_hierarchy": Data("plain hierarchy", small_recipe(42, **PLAIN), 128, **TWO),
        "plain_hierarchy_wide": Data("plain hierarchy", small_recipe(42, **PLAIN), 256, **TWO),
    },
    arms={
        "batchtopk": BenchmarkArm("BatchTopK", BatchTopKTrainingSAEConfig),
        "topk": BenchmarkArm("TopK", TopKTrainingSAEConfig),
        "matryoshka": BenchmarkArm(
            "Matryoshka, levels 4, 16, 64", MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": INNER}
        ),
        "matryoshka_32": BenchmarkArm(
            "Matryoshka, level 32", MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [32]}
        ),
        "groups": BenchmarkArm("groups", SAMPLED, GROUPS),
        "nested": BenchmarkArm("nested in groups, levels 4, 16, 64", SAMPLED, GROUPS | {"matryoshka_widths": INNER}),
        "nested_one_pool": BenchmarkArm(
            "nested in one pool, levels 4, 16, 64", SAMPLED, {"pool_factor": 10, "matryoshka_widths": INNER}
        ),
        "nested_light": BenchmarkArm(
            "nested in groups, level 64, inner loss x 0.5",
            SAMPLED,
            GROUPS | {"matryoshka_widths": [64], "inner_loss_coefficient": 0.5},
        ),
        "all_light": BenchmarkArm(
            "all latents, level 64, inner loss x 0.5",
            SAMPLED,
            {"pool_factor": 10**6, "matryoshka_widths": [64], "inner_loss_coefficient": 0.5},
        ),
        "scheduled": BenchmarkArm("groups, pool factor from 3 to 10", VariantConfig, SCHEDULED),
        "winsorised": BenchmarkArm("groups, winsorised score", SAMPLED, GROUPS | WINSORISED_IN_GROUP),
        "then_plain": BenchmarkArm(
            "nested in groups, levels 4, 16, 64, then plain", SAMPLED, THEN_PLAIN | {"matryoshka_widths": INNER}
        ),
        "one_pool": BenchmarkArm("one pool", SAMPLED, {"pool_factor": 10}),
        "one_pool_orthogonal": BenchmarkArm(
            "one pool, orthogonality penalty", VariantConfig, {"pool_factor": 10, "orthogonality": 1.0}
        ),
    },
    ks=(3, 4, 5),
    n_seeds=5,
    batch_size=512,
    samples=512_000,
    lr=2e-3,
    warm_up=0.05,
    decay=0.2,
    dead_window=100,
    eval_samples=32_768,
    aux_loss_coefficient=1 / 32,
)
"""The recipe at a size that two CPU cores can train."""

LEVELS = ([32], [64], [8, 32], [16, 64], [4, 16, 64], [8, 32, 80], [16, 48, 80])

TUNING = replace(
    SMALL,
    name="tuning",
    data={"features_7": Data("features of seed 7", small_recipe(7), 128)},
    arms={
        "batchtopk": SMALL.arms["batchtopk"],
        "groups": SMALL.arms["groups"],
        **{
            f"matryoshka_{'_'.join(map(str, levels))}": BenchmarkArm(
                f"Matryoshka, {levels}", MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": levels}
            )
            for levels in LEVELS
        },
        **{
            f"nested_{'_'.join(map(str, levels))}_{coefficient:g}": BenchmarkArm(
                f"nested in groups, {levels}, inner loss x {coefficient:g}",
                SAMPLED,
                GROUPS | {"matryoshka_widths": levels, "inner_loss_coefficient": coefficient},
            )
            for levels in LEVELS
            for coefficient in ((1, 0.5, 0.25) if levels in ([64], [16, 64], [4, 16, 64]) else (1,))
        },
        "factor_16": BenchmarkArm(
            f"nested in groups, {INNER}, pool factor 16",
            SAMPLED,
            GROUPS | {"pool_factor": 16, "matryoshka_widths": INNER},
        ),
        **{
            f"scheduled_{first}": BenchmarkArm(
                f"groups, pool factor from {first} to 10", VariantConfig, SCHEDULED | {"first_pool_factor": first}
            )
            for first in (3, 20)
        },
        "winsorised": SMALL.arms["winsorised"],
        **{
            f"winsorised_factor_{factor}": BenchmarkArm(
                f"groups, winsorised score, pool factor {factor}",
                SAMPLED,
                {"pool_factor": factor, "pool_group_size": 16, "score": f"winsorised_group_{factor}"},
            )
            for factor in (5, 20)
        },
        "winsorised_nested": BenchmarkArm(
            f"nested in groups, {INNER}, winsorised score",
            SAMPLED,
            GROUPS | WINSORISED_IN_GROUP | {"matryoshka_widths": INNER},
        ),
        "winsorised_light": BenchmarkArm(
            "nested in groups, [64], inner loss x 0.5, winsorised score",
            SAMPLED,
            GROUPS | WINSORISED_IN_GROUP | {"matryoshka_widths": [64], "inner_loss_coefficient": 0.5},
        ),
        "winsorised_then_plain": BenchmarkArm(
            f"nested in groups, {INNER}, then plain, winsorised score",
            SAMPLED,
            THEN_PLAIN | WINSORISED_IN_GROUP | {"matryoshka_widths": INNER},
        ),
        **{
            f"then_plain_{'_'.join(map(str, levels))}": BenchmarkArm(
                f"nested in groups, {levels}, then plain", SAMPLED, THEN_PLAIN | {"matryoshka_widths": levels}
            )
            for levels in LEVELS[:5]
        },
        "one_pool": SMALL.arms["one_pool"],
        **{
            f"one_pool_orthogonal_{weight:g}": BenchmarkArm(
                f"one pool, orthogonality penalty x {weight:g}",
                VariantConfig,
                {"pool_factor": 10, "orthogonality": weight},
            )
            for weight in (0.1, 1.0, 10.0)
        },
    },
    ks=(4,),
    n_seeds=2,
)
"""How the levels, pool factor and coefficient of `SMALL` were chosen, on features that `SMALL` does not use."""

DICTIONARIES = replace(
    SMALL,
    name="dictionaries",
    data={f"features_{seed}": Data(f"features of seed {seed}", small_recipe(seed), 128) for seed in range(51, 57)},
    arms={
        "batchtopk": BenchmarkArm("BatchTopK", SAMPLED, BATCHTOPK),
        **{name: SMALL.arms[name] for name in ("topk", "matryoshka", "matryoshka_32", "groups")},
        **THEN_ALL_ARMS,
        **{name: SMALL.arms[name] for name in ("nested_light", "then_plain", "one_pool")},
    },
    n_seeds=1,
)
"""The arms that remained after `SMALL` and `FACTORIAL`, on features that guided no choice: with one SAE per arm and k
for each dictionary of features, intervals cover the choice of features, but not the seeds of weights and samples."""

INNER_16K = [128, 512, 2048]

SYNTH_SAE_BENCH_16K = Benchmark(
    name="synth-sae-bench-16k",
    data={"features_42": Data("SynthSAEBench-16k", RECIPE_16K, 4096, large=True)},
    arms={
        "batchtopk": BenchmarkArm("BatchTopK", SAMPLED, BATCHTOPK),
        "matryoshka": BenchmarkArm(
            "Matryoshka",
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"matryoshka_widths": INNER_16K, "use_matryoshka_aux_loss": True},
        ),
        "groups": BenchmarkArm("groups", SAMPLED, GROUPS),
        **THEN_ALL_ARMS,
        "then_plain": BenchmarkArm(
            "nested in groups, then plain",
            SAMPLED,
            GROUPS | {"matryoshka_widths": INNER_16K},
            steps={"inner_loss_steps": 0.5},
        ),
    },
    ks=(25, 20),
    n_seeds=2,
    batch_size=1024,
    samples=200_000_000,
    lr=3e-4,
    warm_up=0.0,
    decay=0.0,
    dead_window=1000,
    eval_samples=500_000,
    aux_loss_coefficient=1.0,
    n_checkpoints=50,
    device="cuda",
)
"""The benchmark itself, with the settings of SAELens' documentation. Matryoshka is SAELens' class."""

SYNTH_SAE_BENCH_16K_CPU = replace(
    SYNTH_SAE_BENCH_16K,
    name="synth-sae-bench-16k-cpu",
    ks=(25,),
    n_seeds=1,
    samples=5_000_000,
    eval_samples=50_000,
    n_checkpoints=20,
    device="cpu",
)
"""The same with a fortieth of the samples, at one k and seed, for two CPU cores."""

PUBLISHED_16K = {
    25: {"BatchTopK": {"f1": 0.7316, "mcc": 0.7574}, "Matryoshka": {"f1": 0.8793, "mcc": 0.7927}},
    20: {"BatchTopK": {"f1": 0.8183, "mcc": 0.7526}, "Matryoshka": {"f1": 0.8601, "mcc": 0.7455}},
}
"""Results of arXiv 2602.14687 with 200M samples, by L0."""

SHARES = (10, 20, 30, 40)
"""Pool sizes of the factorial, in percent of the dictionary."""
SCORES = {"l2": {"score": "l2_norm"}, "winsorised": WINSORISED}


def factorial(name: str, seed: int) -> Benchmark:
    """Which pools pay off at which sizes: d_sae x k x share of the dictionary in a pool x score, and BatchTopK."""
    return replace(
        SMALL,
        name=name,
        data={f"latents_{d_sae}": Data(f"{d_sae} latents", small_recipe(seed), d_sae) for d_sae in (64, 128, 256, 512)},
        arms={
            "batchtopk": BenchmarkArm("BatchTopK", SAMPLED, BATCHTOPK),
            **{
                f"{score}_{percent}": BenchmarkArm(
                    f"groups of {percent} % of the latents, {score}, then all latents",
                    SAMPLED,
                    {"pool_group_size": GROUPS["pool_group_size"], **fields},
                    steps=THEN_ALL,
                    pool_share=percent / 100,
                )
                for score, fields in SCORES.items()
                for percent in SHARES
            },
        },
        ks=(2, 4, 8),
        n_seeds=3,
    )


FACTORIAL = factorial("factorial", seed=44)
"""On features that no other benchmark uses."""
FACTORIAL_CHECK = factorial("factorial_check", seed=45)
"""The same on other features, to check the predictions from `FACTORIAL`."""

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        SMALL,
        TUNING,
        DICTIONARIES,
        SYNTH_SAE_BENCH_16K,
        SYNTH_SAE_BENCH_16K_CPU,
        FACTORIAL,
        FACTORIAL_CHECK,
    )
}
