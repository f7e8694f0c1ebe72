"""A study's settings: everything that its numbers depend on."""

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
    """Data with known features, like SynthSAEBench (arXiv 2602.14687) at a smaller scale."""

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
    """The synthetic model, as SAELens configures it."""
    d_sae: int = 256
    """Number of latents."""
    k: int = 5
    """Mean latents kept per sample; 5.2 features fire on average."""
    batch_size: int = 512
    """Samples per training step."""
    steps: int = 1000
    """Training steps."""
    lr: float = 2e-3
    """Adam's learning rate, after a twentieth of the steps and until the last fifth of them."""
    dead_window: int = 100
    """Training steps without firing after which a latent counts as dead."""
    eval_samples: int = 32_768
    """Fresh samples for evaluation."""


@dataclass(frozen=True)
class Study:
    """One study; `arms` in `plan.py` says which SAEs it trains."""

    name: str
    """Name on the command line and in the name of the results folder."""
    model: str
    """Language model: a Hub name, a folder in Hugging Face format, or "smollm2"."""
    model_parameters: int
    """Number of model parameters, for estimating costs."""
    dataset: str
    """Training text: a Hub name or a folder with a split `train`."""
    held_out: str
    """Held-out text, for all but probing and absorption: a Hub name, a JSONL file or a folder with a split `train`."""
    hook: str
    """TransformerLens' name of the hook whose activations are used."""
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents in all arms except the narrow ones."""
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
    """SAEBench evals to run, with overrides of their configurations."""
    probing_datasets: tuple[str, ...] = ()
    """Labelled sets for sparse probing, as files or folders; empty for SAEBench's eight."""
    probing_splits: int = 0
    """Splits per task of `probing_tasks.py`, which are built from the text folder that the user names and replace
    `probing_datasets`; 0 for none."""
    probing_tasks: str = ""
    """Fingerprint of the built tasks, in place of `probing_datasets` in the settings."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """Settings of the part on data with known features."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the auxiliary loss, in every arm."""
    pool_factors: tuple[float, ...] = (1.5, 3, 5, 10, 20)
    """Pool factors of the sweep."""
    group_sizes: tuple[int, ...] = (16, 64, 256)
    """Group sizes of the sweep, each combined with every pool factor; one pool per batch is always included."""
    fixed_pool_factor: float = 5
    """Pool factor of the arms that vary the score or the order of tokens."""
    scores: tuple[str, ...] = ("squared_l2", "entropy", "perplexity", "ridge_leverage", "uniform")
    """Scores compared with `l2_norm` at the fixed pool factor."""
    sampled_scores: tuple[str, ...] = ("squared_l2", "uniform")
    """Scores whose pools are drawn in proportion to the score."""
    n_seeds: int = 3
    """SAEs trained per arm."""
    n_stability_seeds: int = 5
    """SAEs trained per arm for BatchTopK and for the fixed pool factor, with one pool and in groups of 16: at
    least `n_seeds`, for comparisons between seeds."""
    seeds_by_arm: dict[str, int] = field(default_factory=dict)
    """SAEs trained of arms that get fewer than those numbers, by arm."""
    mixed_prompts: int = 16
    """Prompts in the activation store's mixing buffer (SAELens' `n_batches_in_buffer`)."""
    held_out_tokens: int = 65_536
    """Tokens for finding live latents and contexts; thresholds at equal L0 are set on one half and measured on the
    other. SAEBench's evals have their own numbers of tokens."""
    saes_per_run: int = 6
    """Largest number of SAEs trained together in one run of SAELens, from one pass of the language model. A run is one
    unit of work."""
    device: str = "cpu"
    """PyTorch device name."""
    arms: tuple[str, ...] = ("*",)
    """Name patterns of the arms that are included."""
    on_synthetic_data: bool = True
    """Whether the arms are also trained on data with known features, which are the same in every study."""
    dtype: str = "float32"
    """Dtype of the language model in training and evals; in evals also of the SAEs."""
    cached: bool = False
    """Whether activations are cached in a file, so that one pass of the model serves all arms and seeds, and batches
    are drawn from the whole text; otherwise the store mixes only `mixed_prompts` prompts at a time."""
    pictures: tuple[str, ...] = ("pool_factor", "pareto", "densities", "similarity", "synthetic")
    """Pictures on the page, by their names in `figures.py`."""
    absorption: dict[str, Any] = field(default_factory=dict)
    """Overrides of absorption's configuration, if absorption takes too long for every SAE: it is then a stage of its
    own, for the first `absorption_seeds` SAEs of each of `absorption_arms`, and not among `evals`."""
    absorption_arms: tuple[str, ...] = ()
    """Arms that the stage `absorption` evaluates."""
    absorption_seeds: int = 0
    """SAEs per arm that the stage `absorption` evaluates."""
    own_steps: bool = False
    """Whether this package's step trains SAELens' TopK, BatchTopK and Matryoshka: faster, with the same selection and
    sums equal up to rounding. They are saved and evaluated as SAELens' classes."""
    first_seed: int = 0
    """Seed of the first SAE of each arm."""
    controls: bool = False
    """Whether to include two more control arms: a decoder that is not trained, and a tenth of the training."""
    shared_folder: str = ""
    """Name of the work folder, if studies share one with the text, activations, probes and SAEs that all have."""
    text: str = ""
    """Fingerprint of a user's text, in place of `dataset` and `held_out` in the settings."""

    def seeds(self, n: int) -> range:
        """Seeds of the first `n` SAEs of an arm."""
        return range(self.first_seed, self.first_seed + n)

    def settings(self) -> dict[str, Any]:
        """Settings that determine the results on the language model, as JSON values; without how the work is split."""
        fields = {name: value for name, value in asdict(self).items() if name not in NEUTRAL}
        # The same study in another clone has other paths.
        bundled = {name: fields[name].removeprefix(str(EXAMPLES)) for name in ("model", "dataset", "held_out")}
        bundled["probing_datasets"] = [path.removeprefix(str(EXAMPLES)) for path in self.probing_datasets]
        if self.text:
            del bundled["dataset"], bundled["held_out"], fields["dataset"], fields["held_out"]
        if self.probing_tasks:
            del bundled["probing_datasets"], fields["probing_datasets"]
        # Fields that were added later: results from before lack them, and belong to their defaults.
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
    *("n_seeds", "n_stability_seeds", "seeds_by_arm", "first_seed", "controls", "shared_folder"),
    *("pool_factors", "group_sizes", "scores", "arms"),
    *("on_synthetic_data", "pictures", "absorption", "absorption_arms", "absorption_seeds", "probing_splits"),
)
"""Fields of `Study` that `settings` leaves out: they add or remove results, or affect only results with settings of
their own (`synthetic`, `absorption`), other fields (`probing_splits`: `probing_tasks`) or last digits (`device`)."""
