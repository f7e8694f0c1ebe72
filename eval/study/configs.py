"""The settings of the studies: everything that their numbers depend on."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

from bundled import EXAMPLES, HELD_OUT_TEXT, PROBING_DATASETS, TINY_LM


@dataclass(frozen=True)
class Synthetic:
    """Data with known features, of the kind of SynthSAEBench (arXiv 2602.14687) at a smaller scale."""

    data: SyntheticModelConfig = field(
        default_factory=lambda: SyntheticModelConfig(
            num_features=512,
            hidden_dim=96,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=1e-2),
            hierarchy=HierarchyConfig(
                total_root_nodes=16, branching_factor=4, max_depth=2, mutually_exclusive_portion=1.0
            ),
            correlation=LowRankCorrelationConfig(rank=8),
            std_firing_magnitudes=0.5,
            mean_firing_magnitudes=4.0,
            seed=0,
        )
    )
    """The features, as SAELens describes them."""
    d_sae: int = 256
    """Number of latents."""
    k: int = 5
    """Latents kept per sample, on average: as many as features fire, 5.2."""
    batch_size: int = 512
    """Samples per training step."""
    steps: int = 1000
    """Training steps."""
    lr: float = 2e-3
    """Adam's learning rate, after a twentieth of the steps and until the last fifth of them."""
    dead_window: int = 100
    """Training steps without firing after which a latent counts as dead."""
    eval_samples: int = 32_768
    """Fresh samples that an SAE is evaluated on."""


@dataclass(frozen=True)
class Study:
    """One study; `arms` in `plan.py` says which SAEs it trains."""

    name: str
    """Name on the command line and of the results' folder."""
    model: str
    """Language model: a Hub name or a folder in Hugging Face format."""
    model_parameters: int
    """Number of the model's parameters, for the estimate of costs."""
    dataset: str
    """Text that the SAEs are trained on: a Hub name or a folder with a split `train`."""
    held_out: str
    """Text that core is run on: a Hub name or a JSONL file."""
    hook: str
    """Where in the model the activations are read, by TransformerLens' name."""
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents, in all arms but the narrow ones."""
    k: int
    """Latents kept per token, on average."""
    batch_size: int
    """Tokens per training step."""
    steps: int
    """Training steps."""
    lr: float
    """Adam's learning rate, after a twentieth of the steps and until the last fifth of them."""
    dead_window: int
    """Training steps without firing after which a latent counts as dead."""
    context_size: int
    """Tokens per prompt."""
    evals: dict[str, dict[str, Any]]
    """SAEBench's evals to run, with the fields of their configurations that are set."""
    probing_datasets: tuple[str, ...] = ()
    """Labelled sets for sparse probing, as files or folders; none for SAEBench's eight."""
    probing_splits: int = 0
    """Splits of each task in `probing_tasks.py`, which are built from a folder that the user names as the text and are
    probed instead of `probing_datasets`; 0 for none."""
    probing_tasks: str = ""
    """Fingerprint of the built tasks, which stands for `probing_datasets` in the settings."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """The part of the study on data with known features."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the auxiliary loss, in every arm."""
    pool_factors: tuple[float, ...] = (1.5, 3, 5, 10, 20)
    """Pool sizes over k that are swept."""
    group_sizes: tuple[int, ...] = (16, 64, 256)
    """Tokens that share a pool; each is swept with every pool factor, as is one pool per batch."""
    fixed_pool_factor: float = 5
    """Pool size over k of the arms that are about something else."""
    scores: tuple[str, ...] = ("squared_l2", "entropy", "perplexity", "ridge_leverage", "uniform")
    """Scores that are compared with `l2_norm` at the fixed pool factor."""
    sampled_scores: tuple[str, ...] = ("squared_l2", "uniform")
    """Those of the scores whose pools are drawn in proportion to the score."""
    n_seeds: int = 3
    """SAEs trained per arm."""
    n_stability_seeds: int = 5
    """SAEs trained per arm where seeds are compared: BatchTopK, and the fixed pool factor with one pool and in groups
    of 16."""
    mixed_prompts: int = 16
    """Prompts whose tokens the activation store mixes, besides those that it has just read (SAELens'
    `n_batches_in_buffer`, which counts prompts)."""
    held_out_tokens: int = 65_536
    """Tokens for live latents and contexts; thresholds at equal L0 are set on one half of them and measured on the
    other. SAEBench's evals have numbers of their own."""
    saes_per_run: int = 6
    """SAEs trained in one run of SAELens, from one pass of the language model: a unit of work."""
    device: str = "cpu"
    """PyTorch's name of the device."""
    arms: tuple[str, ...] = ("*",)
    """Patterns of the names of arms that there are."""
    on_synthetic_data: bool = True
    """Whether the arms are trained on data with known features too, which are the same in every study."""
    dtype: str = "float32"
    """PyTorch's name of the language model's type, in training and in evals, which have the SAEs in it too."""
    cached: bool = False
    """Whether SAEs are trained on activations from a file, in batches from the whole text: one pass of the model for
    all arms and seeds. Otherwise `mixed_prompts` are mixed."""
    pictures: tuple[str, ...] = ("pool_factor", "pareto", "densities", "similarity", "synthetic")
    """Pictures of the page, by their names in `figures.py`."""
    absorption: dict[str, Any] = field(default_factory=dict)
    """Fields of absorption's configuration where it takes too long for every SAE, and is not among `evals`: it has a
    stage of its own then, for the first `absorption_seeds` SAEs of `absorption_arms`."""
    absorption_arms: tuple[str, ...] = ()
    """Names of arms."""
    absorption_seeds: int = 0
    """SAEs of each."""
    own_steps: bool = False
    """Whether this package's step trains SAELens' TopK, BatchTopK and Matryoshka: the same selection, sums equal up to
    rounding, in less time. They are saved and evaluated as SAELens' classes."""
    first_seed: int = 0
    """Seed of the first SAE of each arm."""
    controls: bool = False
    """Whether there are arms that show what little or no training does."""
    variant_of: str = ""
    """Study whose work folder this one uses too, for what both have in common: text, activations, probes, SAEs."""
    text: str = ""
    """Fingerprint of a text that the user named, which then stands for `dataset` and `held_out` in the settings."""

    def seeds(self, n: int) -> range:
        """Seeds of the first `n` SAEs of an arm."""
        return range(self.first_seed, self.first_seed + n)

    def settings(self) -> dict[str, Any]:
        """What results on the language model depend on, as JSON has it; not where and in which portions it runs."""
        fields = {name: value for name, value in asdict(self).items() if name not in NEUTRAL}
        # A clone in another folder is the same study.
        bundled = {name: fields[name].removeprefix(str(EXAMPLES)) for name in ("model", "dataset", "held_out")}
        bundled["probing_datasets"] = [path.removeprefix(str(EXAMPLES)) for path in self.probing_datasets]
        if self.text:
            del bundled["dataset"], bundled["held_out"], fields["dataset"], fields["held_out"]
        if self.probing_tasks:
            del bundled["probing_datasets"], fields["probing_datasets"]
        # Fields that came later: results without them are those of their defaults.
        later = {"dtype": "float32", "cached": False, "own_steps": False, "text": "", "probing_tasks": ""}
        for name, default in later.items():
            if fields[name] == default:
                del fields[name]
        return json.loads(json.dumps(fields | bundled))

    def absorption_settings(self) -> dict[str, Any]:
        """What the results of absorption's own stage depend on, as JSON has it."""
        return json.loads(json.dumps(self.settings() | {"evals": {"absorption": self.absorption}}))

    def synthetic_settings(self) -> dict[str, Any]:
        """What results on synthetic data depend on, as JSON has it."""
        shared = ("aux_loss_coefficient", "fixed_pool_factor", "sampled_scores")
        own = asdict(self.synthetic) | {"data": self.synthetic.data.to_dict()}
        return json.loads(json.dumps(own | {name: getattr(self, name) for name in shared}))


NEUTRAL = (
    *("name", "model_parameters", "device", "saes_per_run", "synthetic"),
    *("n_seeds", "n_stability_seeds", "first_seed", "controls", "variant_of"),
    *("pool_factors", "group_sizes", "scores", "arms"),
    *("on_synthetic_data", "pictures", "absorption", "absorption_arms", "absorption_seeds", "probing_splits"),
)
"""Fields of `Study` that add or leave out results, but change none."""

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

SMOLLM2 = Study(
    name="smollm2",
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
        "core": {"n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 20},
        "sparse_probing": {"k_values": [1, 2, 5, 20], "context_length": 64},
    },
    # 4 million tokens for the probes before the first SAE, and minutes for each.
    absorption={"min_feats_for_eval": 10, "max_k_value": 3, "k_sparse_probe_num_epochs": 20},
    absorption_arms=("batchtopk", "topk", "pool_5", "pool_10_groups_16"),
    absorption_seeds=1,
    probing_splits=5,
    arms=(
        *("batchtopk", "topk", "matryoshka", "narrow_5", "pool_5", "pool_5_groups_16", "pool_10_groups_16"),
        *("pool_20_groups_16", "nested_10", "nested_20", "nested_10_then_plain"),
    ),
    pool_factors=(5, 10, 20),
    group_sizes=(16,),
    scores=(),
    n_stability_seeds=3,
    on_synthetic_data=False,
    pictures=("densities", "similarity"),
    saes_per_run=4,
    dtype="bfloat16",
    cached=True,
)
"""A model that people study, from a Python package: offline, on two CPU cores, in some hours."""

BLOCK_10 = replace(
    SMOLLM2,
    name="smollm2-block10",
    variant_of="smollm2",
    own_steps=True,
    controls=True,
    first_seed=3,  # the rule of decision is applied to seeds that were not seen when it was written
    n_seeds=5,
    n_stability_seeds=5,
    arms=(
        *("batchtopk", "topk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all", "nested_10_then_plain"),
        *("pool_5", "winsorised_10_groups_16_then_all", "narrow_5", "pool_5_groups_16", "frozen_decoder", "short"),
    ),
    absorption_arms=(
        *("batchtopk", "topk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all", "nested_10_then_plain"),
        *("pool_5", "winsorised_10_groups_16_then_all", "frozen_decoder", "short"),
    ),
    absorption_seeds=5,
    saes_per_run=3,
)
"""What the recommendation is decided by."""
SPLIT_10 = replace(
    BLOCK_10,
    name="smollm2-split10",
    absorption={**SMOLLM2.absorption, "max_k_value": 10},
    absorption_arms=("batchtopk", "pool_10_groups_16"),
)
"""Absorption of two of its arms with as many splits of a latent as SAEBench allows."""
SHORT_EVALS = {"core": SMOLLM2.evals["core"]}
CURVE = tuple(
    replace(
        BLOCK_10,
        name=f"smollm2-k{k}",
        k=k,
        controls=False,
        n_seeds=2,
        n_stability_seeds=2,
        evals=SHORT_EVALS,
        probing_splits=0,
        arms=("batchtopk", "topk", "matryoshka", "pool_10_groups_16"),
        absorption=SMOLLM2.absorption if k == 128 else {},
        absorption_arms=("batchtopk", "topk", "matryoshka", "pool_10_groups_16"),
        absorption_seeds=2,
        pictures=(),
    )
    for k in (16, 64, 128)
)
"""The same at other k; k 32 is `BLOCK_10`."""
FOUR_ARMS = ("batchtopk", "matryoshka", "pool_10_groups_16", "pool_10_groups_16_then_all")
LONG = replace(
    BLOCK_10,
    name="smollm2-10m",
    steps=4880,
    controls=False,
    n_seeds=2,
    n_stability_seeds=2,
    evals=SHORT_EVALS,
    probing_splits=0,
    arms=FOUR_ARMS,
    absorption_arms=FOUR_ARMS,
    absorption_seeds=2,
    pictures=(),
)
"""Five times as many tokens."""
OTHER_BLOCKS = tuple(
    replace(
        BLOCK_10,
        name=f"smollm2-block{block}",
        hook=f"blocks.{block}.hook_resid_post",
        controls=False,
        n_seeds=3,
        n_stability_seeds=3,
        evals=SHORT_EVALS,
        probing_splits=0,
        arms=FOUR_ARMS,
        absorption={},
        pictures=(),
    )
    for block in (3, 20)
)

OTHER_ARCHITECTURES = ("batchtopk", "pool_3", "pool_5", "pool_10_groups_16", "nested_10_then_plain")
"""Arms of the studies that ask whether what holds for one model holds for others."""

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
    study.name: study
    for study in (TINY, SMOLLM2, BLOCK_10, SPLIT_10, *CURVE, LONG, *OTHER_BLOCKS, PYTHIA, GPT2_XL, LLAMA_7B)
}


def smoke(study: Study) -> Study:
    """The same plan with the bundled model, a few steps and small evaluations: every stage, in minutes."""
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
        held_out_tokens=4096,
        absorption=evals.pop("absorption") if study.absorption else {},
        evals=evals,
        synthetic=replace(Synthetic(), d_sae=96, k=5, steps=8, eval_samples=1024),
    )
