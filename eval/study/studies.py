"""The studies, by name: the bundled model, SmolLM2 and its variants, and those that need a GPU."""

from dataclasses import replace
from typing import Any

from bundled import HELD_OUT_TEXT, PROBING_DATASETS, TINY_LM
from study.configs import Study, Synthetic

TINY = Study(
    name="tiny",
    model=str(TINY_LM),
    model_parameters=1_840_000,
    dataset=str(TINY_LM / "text"),
    held_out=str(HELD_OUT_TEXT),
    hook="blocks.2.hook_resid_post",
    d_in=128,
    d_sae=1024,
    k=16,
    batch_size=1024,
    steps=1000,
    lr=2e-3,
    dead_window=200,
    context_size=128,
    evals={
        "core": {"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 20},
        "sparse_probing": {},
        # SAEBench wants 20 letters, which takes a model of two billion parameters.
        "absorption": {"min_feats_for_eval": 10, "max_k_value": 3, "k_sparse_probe_num_epochs": 20},
    },
    probing_datasets=tuple(map(str, PROBING_DATASETS)),
)
"""The bundled language model: on two CPU cores, offline."""

PYTHIA = Study(
    name="pythia-160m",
    model="EleutherAI/pythia-160m-deduped",
    model_parameters=162_322_944,
    dataset="monology/pile-uncopyrighted",
    held_out="Skylion007/openwebtext",  # as in SAEBench
    hook="blocks.6.hook_resid_post",
    d_in=768,
    # The paper's summary does not give width and k; these are usual for this model.
    d_sae=16_384,
    k=64,
    batch_size=4096,
    steps=50_000,
    lr=3e-4,
    dead_window=1000,
    context_size=128,
    # A model of this size can read out about ten letters.
    evals={"core": {}, "sparse_probing": {}, "absorption": {"min_feats_for_eval": 10}},
    mixed_prompts=4096,
    held_out_tokens=262_144,
    saes_per_run=12,
    device="cuda",
)
"""The paper's model, layer, batch size, learning rate, steps and auxiliary coefficient; needs a GPU and a network."""

BLOCK_10 = Study(
    name="smollm2-block10",
    shared_folder="smollm2",
    model="smollm2",  # smollm2.py finds it
    model_parameters=134_515_008,
    dataset=str(TINY_LM / "text"),  # too short: --text names another
    held_out=str(HELD_OUT_TEXT),
    hook="blocks.10.hook_resid_post",
    d_in=576,
    d_sae=4096,
    k=32,
    batch_size=2048,
    steps=976,
    lr=1e-3,
    dead_window=200,
    context_size=128,
    evals={
        "core": {"n_eval_reconstruction_batches": 8, "n_eval_sparsity_variance_batches": 20},
        "sparse_probing": {"k_values": [1, 2, 5, 20], "context_length": 64},
    },
    probing_splits=5,
    # 4 million tokens for the probes before the first SAE, and minutes for each.
    absorption={"min_feats_for_eval": 10, "max_k_value": 3, "k_sparse_probe_num_epochs": 20},
    absorption_arms=(
        *("batchtopk", "topk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all", "nested_10_then_plain"),
        *("pool_5", "winsorised_10_groups_16_then_all", "pool_5_groups_16", "frozen_decoder", "short"),
    ),
    absorption_seeds=5,
    arms=(
        *("batchtopk", "topk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all", "nested_10_then_plain"),
        *("pool_5", "winsorised_10_groups_16_then_all", "narrow_5", "pool_5_groups_16", "frozen_decoder", "short"),
    ),
    pool_factors=(5, 10),
    group_sizes=(16,),
    scores=(),
    controls=True,
    seeds_by_arm=dict.fromkeys(("narrow_5", "frozen_decoder", "short"), 3),  # controls, which the rule does not judge
    first_seed=3,  # the rule of decision is applied to seeds that were not seen when it was written
    n_seeds=5,
    n_stability_seeds=5,
    on_synthetic_data=False,
    own_steps=True,
    pictures=("densities", "similarity"),
    saes_per_run=3,
    dtype="bfloat16",
    cached=True,
)
"""A real model, from a Python package: decides the recommendation. Offline, on two CPU cores, in hours."""
SPLIT_10 = replace(
    BLOCK_10,
    name="smollm2-split10",
    absorption={**BLOCK_10.absorption, "max_k_value": 10},
    arms=("batchtopk", "pool_10_groups_16"),
    absorption_arms=("batchtopk", "pool_10_groups_16"),
    seeds_by_arm={},
    pictures=(),
)
"""Absorption of two of its arms with up to ten splits of a letter, as in SAEBench."""
SHORT_EVALS = {"core": BLOCK_10.evals["core"]}
CURVE = tuple(
    replace(
        BLOCK_10,
        name=f"smollm2-k{k}",
        k=k,
        controls=False,
        n_seeds=2,
        n_stability_seeds=2,
        seeds_by_arm={},
        evals=SHORT_EVALS,
        probing_splits=0,
        arms=("batchtopk", "topk", "matryoshka", "pool_10_groups_16", "pool_5"),
        absorption=BLOCK_10.absorption if k == 128 else {},
        absorption_arms=("batchtopk", "topk", "matryoshka", "pool_10_groups_16"),
        absorption_seeds=2,
        pictures=(),
    )
    for k in (16, 64, 128)
)
"""Five of its arms at other k, with two seeds, no probing, and absorption at k 128 only; k 32 is `BLOCK_10`."""
FOUR_ARMS = ("batchtopk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all")
LONG = replace(
    BLOCK_10,
    name="smollm2-10m",
    steps=4880,
    controls=False,
    n_seeds=2,
    n_stability_seeds=2,
    seeds_by_arm={},
    evals=SHORT_EVALS,
    probing_splits=0,
    arms=FOUR_ARMS,
    absorption_arms=FOUR_ARMS,
    absorption_seeds=2,
    pictures=(),
)
"""Four of its arms with five times as many tokens and two seeds, without probing."""
OTHER_BLOCKS = tuple(
    replace(
        BLOCK_10,
        name=f"smollm2-block{block}",
        hook=f"blocks.{block}.hook_resid_post",
        controls=False,
        n_seeds=3,
        n_stability_seeds=3,
        seeds_by_arm={},
        evals=SHORT_EVALS,
        probing_splits=0,
        arms=FOUR_ARMS,
        absorption={},
        pictures=(),
    )
    for block in (3, 20)
)

OTHER_ARCHITECTURES = ("batchtopk", "pool_3", "pool_5", "pool_10_groups_16", "nested_10_then_plain")
"""Arms of the studies on other language models."""

GPT2_XL = replace(
    PYTHIA,
    name="gpt2-xl",
    model="gpt2-xl",
    model_parameters=1_557_611_200,
    hook="blocks.24.hook_resid_post",
    d_in=1600,
    arms=OTHER_ARCHITECTURES,
)
"""The paper's first open check, with the hyper-parameters of Pythia-160M; nothing is measured."""

LLAMA_7B = replace(
    PYTHIA,
    name="llama-7b",
    model="meta-llama/Llama-2-7b-hf",
    model_parameters=6_738_415_616,
    hook="blocks.16.hook_resid_post",
    d_in=4096,
    arms=OTHER_ARCHITECTURES,
    dtype="bfloat16",
)
"""The same; Llama 2 stands for LLaMA."""

STUDIES = {
    study.name: study for study in (TINY, BLOCK_10, SPLIT_10, *CURVE, LONG, *OTHER_BLOCKS, PYTHIA, GPT2_XL, LLAMA_7B)
}


def smoke(study: Study) -> Study:
    """The same arms with two seeds, the bundled model, a few steps and small evaluations: every stage, in minutes."""
    evals: dict[str, dict[str, Any]] = {
        "core": {
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
            "batch_size_prompts": 4,
            "context_size": 48,
        },
        "sparse_probing": {"probe_train_set_size": 80, "probe_test_set_size": 40, "context_length": 32},
        "absorption": {
            "max_k_value": 2,
            "k_sparse_probe_num_epochs": 1,
            "min_feats_for_eval": 5,
            "min_GT_probe_f1": 0.3,
        },
    }
    return replace(
        TINY,
        name=f"{study.name}-smoke",
        fixed_pool_factor=study.fixed_pool_factor,
        sampled_scores=study.sampled_scores,
        d_sae=160,
        k=8,
        batch_size=512,
        steps=8,
        dead_window=4,
        pool_factors=study.pool_factors,
        group_sizes=study.group_sizes,
        scores=study.scores,
        arms=study.arms,
        on_synthetic_data=study.on_synthetic_data,
        pictures=study.pictures,
        absorption_arms=study.absorption_arms,
        absorption_seeds=study.absorption_seeds,
        cached=study.cached,
        own_steps=study.own_steps,
        first_seed=study.first_seed,
        controls=study.controls,
        dtype=study.dtype,
        n_seeds=2,
        n_stability_seeds=2,
        seeds_by_arm={},
        held_out_tokens=4096,
        absorption=evals.pop("absorption") if study.absorption else {},
        evals=evals,
        synthetic=replace(Synthetic(), d_sae=96, k=5, steps=8, eval_samples=1024),
    )
