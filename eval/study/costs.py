"""What a study would cost: the plan with tokens, memory, disk and hours, before anything is run."""

from collections.abc import Sequence

import torch
from sae_lens.util import str_to_dtype

from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.kept_entries import choose_path
from study.configs import Study
from study.plan import Unit, arms, compared, runs, synthetic_units, trained_config, units
from study.probing_tasks import N_ROWS, TASKS

FLOPS = 1.2e13
"""Floating point operations per second of one GPU: 0.6 of an A100's peak without TF32, which PyTorch leaves off."""
EVAL_MINUTES = 8
"""Minutes of core, sparse probing and absorption for one SAE on such a GPU: a guess until one is measured."""
DENSE_PRODUCTS, DENSE_COPIES = 6, 8
"""Products of size tokens x d_in x d_sae in a BatchTopK step, and matrices (tokens, d_sae) alive at its peak."""
COLUMN_PRODUCTS = 5
"""Products of size tokens x d_in x n_candidates after the scan, if a step is computed by columns of the pool."""
KEPT_OUTPUTS = 2
"""Matrices (tokens, d_sae) that SAELens' multi-SAE trainer holds for each dense SAE until the next step."""
PROBING_PROMPTS = 36 * 2500
"""Prompts of SAEBench's eight labelled sets, 128 tokens each; their activations are on disk during probing."""


def format_plan(study: Study) -> str:
    """The plan as text, without the stage `absorption`."""
    trained = [unit for run in runs(study) for unit in run]
    tokens, samples = study.steps * study.batch_size, study.synthetic.steps * study.synthetic.batch_size
    lines = [
        f"Study {study.name}: {study.model}, {study.hook}, d_sae {study.d_sae}, k {study.k}, batch {study.batch_size}, "
        f"lr {study.lr:g}, {study.steps:,} steps, auxiliary coefficient {study.aux_loss_coefficient:g}",
        "",
        f"{'arm':32}{'seeds':>6}  ",
        *(f"{arm.name:32}{arm.n_seeds:>6}  {arm.label}" for arm in arms(study)),
        "",
        f"train      {len(trained)} SAEs in {len(runs(study))} runs of up to {study.saes_per_run}; "
        f"{tokens:,} tokens per run, {tokens * model_passes(study):,} through the language model, "
        f"{tokens * len(trained):,} through SAEs",
        f"evaluate   {len(units(study))} exports: {', '.join(study.evals)}; "
        f"thresholds, live latents and contexts from {study.held_out_tokens:,} tokens",
        f"synthetic  {len(synthetic_units(study))} SAEs, each trained on {samples:,} samples",
        f"compare    {len(list(compared(study)))} pairs of arms, between seeds",
        "",
        f"memory     {gib(max(memory(study, run) for run in runs(study)))} of the device at the peak of a run",
        *([f"disk       {gib(2 * tokens * study.d_in)} of activations"] if study.cached else []),
        f"disk       {gib(len(trained) * 4 * sae_parameters(study))} of SAEs, "
        f"{gib(probing_scratch(study))} while probing, and a few MiB of results",
    ]
    hours = training_flops(study) / FLOPS / 3600
    eval_hours = len(units(study)) * EVAL_MINUTES / 60
    if study.device == "cuda":
        lines.append(
            f"GPU hours  {hours:.0f} of training at {FLOPS / 1e12:.0f} TFLOP/s, and about {eval_hours:.0f} of "
            f"SAEBench at {EVAL_MINUTES} minutes per SAE"
        )
    else:
        lines.append(f"products   {training_flops(study):.2g} floating point operations of training")
    return "\n".join(lines)


def sae_parameters(study: Study) -> int:
    return 2 * study.d_in * study.d_sae + study.d_in + study.d_sae


def memory(study: Study, run: Sequence[Unit]) -> int:
    """Peak bytes of a training run, which needs more memory than the other stages.

    These are the model, the mixed activations twice, weights with gradients and Adam's moments, outputs of the dense
    SAEs, and one dense step.
    """
    model = str_to_dtype(study.dtype).itemsize * study.model_parameters
    mixed = 2 * study.mixed_prompts * study.context_size * study.d_in
    n_dense = sum(step_path(study, unit) == "dense" for unit in run)
    dense = (DENSE_COPIES + KEPT_OUTPUTS * n_dense) * study.batch_size * study.d_sae
    return model + 4 * (mixed + 4 * len(run) * sae_parameters(study) + dense)


def probing_scratch(study: Study) -> int:
    """Bytes on disk while the built tasks or SAEBench's own sets are probed; 0 for the small `probing_datasets`."""
    if "sparse_probing" not in study.evals:
        return 0
    if study.probing_splits:
        n_prompts = study.probing_splits * len(TASKS) * 2 * sum(N_ROWS.values())
        n_tokens = study.evals["sparse_probing"].get("context_length", 128)
        return n_prompts * n_tokens * str_to_dtype(study.dtype).itemsize * study.d_in
    return 0 if study.probing_datasets else PROBING_PROMPTS * 128 * 4 * study.d_in


def training_flops(study: Study) -> float:
    """Floating point operations of all training runs: the language model's passes, and the SAEs' products."""
    tokens = study.steps * study.batch_size
    per_product = 2 * tokens * study.d_in * study.d_sae
    products = sum(products_of(study, unit) for run in runs(study) for unit in run)
    return 2 * study.model_parameters * tokens * model_passes(study) + products * per_product


def model_passes(study: Study) -> int:
    """How often the language model reads the text: once per run, or once in all if activations are cached."""
    return 1 if study.cached else len(runs(study))


def products_of(study: Study, unit: Unit) -> float:
    """Products of tokens x d_in x the study's d_sae in a training step, without AuxK, which depends on dead latents."""
    config = trained_config(study, unit.arm, unit.seed)
    dense = DENSE_PRODUCTS * config.d_sae / study.d_sae
    if not isinstance(config, SampledTopKTrainingSAEConfig):
        return dense
    columns = 1 + COLUMN_PRODUCTS * config.n_candidates / study.d_sae
    return {"dense": dense, "columns": columns, "kept": 1}[step_path(study, unit)]


def step_path(study: Study, unit: Unit) -> str:
    """Path of a training step: "dense" as in SAELens, or one of Sampled-SAE's with fewer products.

    On a GPU, where a run would time the paths, it is a guess.
    """
    config = trained_config(study, unit.arm, unit.seed)
    if not isinstance(config, SampledTopKTrainingSAEConfig):
        return "dense"
    return choose_path(config, config.step, study.batch_size, torch.device(study.device))


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
