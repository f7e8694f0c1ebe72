"""SAEs trained on the bundled language model, small evaluation runs, and direct calls of SAEBench."""

import itertools
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from torch import Tensor

from bundled import EXAMPLES, TINY_LM
from sae_lens_sampled import SampledTopKTrainingSAEConfig

try:
    from sae_bench.evals.absorption import common, feature_absorption, vocab
except ModuleNotFoundError:  # the extra `eval` is not installed
    pass
else:

    def fewer_words(tokenizer: Any, **kwargs: Any) -> list[str]:
        """Every third word, because absorption spends most of its time on words."""
        return sorted(vocab.get_alpha_tokens(tokenizer, **kwargs))[::3]

    common.get_alpha_tokens = feature_absorption.get_alpha_tokens = fewer_words

HOOK = "blocks.2.hook_resid_post"
D_IN, D_SAE, K = 128, 160, 8
KINDS = {
    "sampled_topk": (SampledTopKTrainingSAEConfig, {"k": K, "pool_factor": 5, "pool_group_size": 16}),
    "batchtopk": (BatchTopKTrainingSAEConfig, {"k": K}),
    "topk": (TopKTrainingSAEConfig, {"k": K}),
    "jumprelu": (JumpReLUTrainingSAEConfig, {"jumprelu_init_threshold": 4.0, "jumprelu_bandwidth": 1.0}),
    "gated": (GatedTrainingSAEConfig, {"l1_coefficient": 1.0}),
}
SMALL = {
    "core": {
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 3,
        "batch_size_prompts": 4,
        "context_size": 48,
    },
    "sparse_probing": {"probe_train_set_size": 80, "probe_test_set_size": 40, "context_length": 32, "k_values": [1, 2]},
    "absorption": {"max_k_value": 2, "k_sparse_probe_num_epochs": 3, "min_feats_for_eval": 5, "min_GT_probe_f1": 0.3},
    "mmcs": {},
}
ALL = list(SMALL)
PROBING = EXAMPLES / "tiny_probing" / "sentence_polarity"
GIVEN = {"model": TINY_LM, "text": TINY_LM / "text", "probing_datasets": [PROBING], "show_progress": False}


def files_in(folder: Path) -> set[tuple[str, int]]:
    """Files under `folder` with their modification times, without Python's caches."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {(str(path), path.stat().st_mtime_ns) for path in files}


def trained_sae(kind: str, seed: int, x: Tensor, n_steps: int = 60) -> TrainingSAE[Any]:
    torch.manual_seed(seed)
    config_class, fields = KINDS[kind]
    metadata = SAEMetadata(model_name=str(TINY_LM), hook_name=HOOK, context_size=48, prepend_bos=False)
    config = config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **fields)
    sae = get_sae_training_class(kind)[0](config)
    order = torch.Generator().manual_seed(seed)
    stream = (x[torch.randint(len(x), (256,), generator=order)] for _ in itertools.count())
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * 256,
        train_batch_size_samples=256,
        lr=3e-3,
        lr_end=3e-4,
        dead_feature_window=100,
    )
    return SAETrainer(trainer_config, sae, stream).fit()


@contextmanager
def official(path: Path):
    """Make SAEBench accept a model folder as a user would have to, without this package."""
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    OFFICIAL_MODEL_NAMES.append(str(path))
    try:
        yield str(path)
    finally:
        OFFICIAL_MODEL_NAMES.remove(str(path))


def core_by_hand(name: str, sae: Any, folder: Path, text: Path = TINY_LM / "text", dtype: str = "float32") -> Any:
    """Result that SAEBench's core eval writes for an SAE whose metadata has the model's path as its name."""
    import sae_bench.evals.core.main as core

    small = SMALL["core"]
    with official(TINY_LM):
        core.multiple_evals(
            [(name, sae)],
            n_eval_reconstruction_batches=small["n_eval_reconstruction_batches"],
            n_eval_sparsity_variance_batches=small["n_eval_sparsity_variance_batches"],
            eval_batch_size_prompts=small["batch_size_prompts"],
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(text),
            context_size=small["context_size"],
            output_folder=str(folder),
            dtype=dtype,
            device="cpu",
        )
    return json.loads((folder / f"{name}_custom_sae_eval_results.json").read_text())


def run_small(saes, evals, output_dir, **fields):
    from sae_lens_sampled.saebench import run_evals

    overrides = {name: SMALL[name] for name in evals}
    return run_evals(saes, evals, output_dir=output_dir, **{**GIVEN, "overrides": overrides, **fields})


def exported(saes, name):
    """A fresh copy of the SAE passed to SAEBench, with the model's path as its name, as `core_by_hand` requires."""
    from sae_lens_sampled.saebench import load_saes

    [sae] = load_saes([pair for pair in saes if pair[0] == name])
    sae.sae.cfg.metadata.model_name = str(TINY_LM)
    return sae.sae
