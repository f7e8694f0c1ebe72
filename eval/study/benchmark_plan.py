"""What the benchmark of nested losses trains: data by SynthSAEBench's recipe, and arms."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

RECIPE_16K = SyntheticModelConfig(
    num_features=16_384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
"""SynthSAEBench-16k, as SAELens' documentation has it."""


@dataclass(frozen=True)
class Data:
    """Features, and how many latents are to find them."""

    label: str
    features: SyntheticModelConfig
    d_sae: int
    is_for_tuning: bool = False
    """Whether settings were chosen on it; none of its numbers is reported beside the others."""


@dataclass(frozen=True)
class BenchmarkArm:
    """One configuration."""

    label: str
    config: type[TrainingSAEConfig]
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Data, arms and the settings that they share."""

    name: str
    data: dict[str, Data]
    arms: dict[str, BenchmarkArm]
    ks: tuple[int, ...]
    """Latents kept per sample, on average."""
    n_seeds: int
    """SAEs per arm, data and k."""
    batch_size: int
    samples: int
    """Training samples."""
    lr: float
    """Adam's learning rate, after `warm_up` and until the last `decay` of the steps."""
    warm_up: float
    decay: float
    dead_window: int
    """Training steps without firing after which a latent counts as dead."""
    eval_samples: int
    """Fresh samples that an SAE is evaluated on."""
    aux_loss_coefficient: float | None = None
    """Weight of the auxiliary loss in every arm; None for each one's own default."""
    n_checkpoints: int = 0
    device: str = "cpu"

    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON has it; not which data, arms, k and seeds there are."""
        left_out = ("name", "device", "n_checkpoints", "data", "arms", "ks", "n_seeds")
        return {name: value for name, value in asdict(replace(self, data={}, arms={})).items() if name not in left_out}


@dataclass(frozen=True)
class BenchmarkUnit:
    """One SAE."""

    data: str
    k: int
    seed: int
    arm: str

    @property
    def stream(self) -> tuple[str, int, int]:
        """What all arms that see the same samples have in common."""
        return self.data, self.k, self.seed

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What its result is found by."""
        return self.data, self.k, self.arm, self.seed


def units(benchmark: Benchmark) -> Iterator[BenchmarkUnit]:
    """Every SAE, those of a stream of samples one after the other."""
    for seed in range(benchmark.n_seeds):
        for data in benchmark.data:
            for k in benchmark.ks:
                for arm in benchmark.arms:
                    yield BenchmarkUnit(data, k, seed, arm)


def new_sae(benchmark: Benchmark, unit: BenchmarkUnit) -> TrainingSAE:
    """An untrained SAE."""
    arm, data = benchmark.arms[unit.arm], benchmark.data[unit.data]
    fields = dict(arm.fields)
    if widths := fields.get("matryoshka_widths"):
        fields["matryoshka_widths"] = [*widths, data.d_sae]
    if benchmark.aux_loss_coefficient is not None:
        fields["aux_loss_coefficient"] = benchmark.aux_loss_coefficient
    shared = {"d_in": data.features.hidden_dim, "d_sae": data.d_sae, "k": unit.k, "device": benchmark.device}
    config = arm.config(**shared, **fields)
    return get_sae_training_class(config.architecture())[0](config)


BENCHMARKS: dict[str, Benchmark] = {}
