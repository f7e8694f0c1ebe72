"""What a study is made of: every setting that its numbers depend on."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

from bundled import EXAMPLES


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
        """Settings that determine the results on the language model, as JSON values; not how the work is split."""
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
        """Settings that determine the results of absorption's own stage, as JSON values."""
        return json.loads(json.dumps(self.settings() | {"evals": {"absorption": self.absorption}}))

    def synthetic_settings(self) -> dict[str, Any]:
        """Settings that determine the results on synthetic data, as JSON values."""
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
