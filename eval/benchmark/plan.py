"""The definition of a benchmark: data, arms, the settings that they share, and the SAEs to train."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic import SyntheticModelConfig

from benchmark.variants import register_variants


@dataclass(frozen=True)
class Data:
    """A data set with known features, and the number of latents of the SAEs trained on it."""

    label: str
    features: SyntheticModelConfig
    d_sae: int
    arms: tuple[str, ...] | None = None
    """Arms that are trained on this data; None for all."""
    ks: tuple[int, ...] | None = None
    """Values of k; None for the benchmark's."""
    large: bool = False
    """Whether `large_synthetic_model` makes the features."""


@dataclass(frozen=True)
class BenchmarkArm:
    """One configuration."""

    label: str
    config: type[TrainingSAEConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    """Config fields that are numbers of training steps, given as shares of all steps."""
    pool_share: float | None = None
    """Candidates as a share of the dictionary, instead of a pool factor."""


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
    """Samples that an SAE is evaluated on; those of the first training batch may be among them."""
    aux_loss_coefficient: float
    """Weight of the auxiliary loss, in every arm."""
    n_checkpoints: int = 0
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.samples // self.batch_size

    def settings(self) -> dict[str, Any]:
        """Settings that results depend on, as JSON values; without the choice of data, arms, k and seeds."""
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
        """Key shared by the arms that are trained together, on one pass over the samples."""
        return self.data, self.k, self.seed

    @property
    def key(self) -> tuple[str, int, str, int]:
        """Key of the SAE's result."""
        return self.data, self.k, self.arm, self.seed


def units(benchmark: Benchmark) -> Iterator[BenchmarkUnit]:
    """Every SAE, ordered by stream; without SAEs whose pool would have fewer than k latents."""
    for seed in range(benchmark.n_seeds):
        for data in benchmark.data:
            of_data = benchmark.data[data]
            for k in of_data.ks or benchmark.ks:
                for arm in of_data.arms or benchmark.arms:
                    factor = pool_factor(benchmark.arms[arm], of_data, k)
                    if factor is None or factor >= 1:
                        yield BenchmarkUnit(data, k, seed, arm)


def streams(benchmark: Benchmark) -> list[list[BenchmarkUnit]]:
    """Every SAE, grouped by `stream`."""
    together: dict[tuple[str, int, int], list[BenchmarkUnit]] = {}
    for unit in units(benchmark):
        together.setdefault(unit.stream, []).append(unit)
    return list(together.values())


def pool_factor(arm: BenchmarkArm, data: Data, k: int) -> float | None:
    """The pool factor of an arm whose pool is a share of the dictionary; None for other arms."""
    return None if arm.pool_share is None else arm.pool_share * data.d_sae / k


def new_sae(benchmark: Benchmark, unit: BenchmarkUnit) -> TrainingSAE:
    """An untrained SAE."""
    register_variants()
    arm, data = benchmark.arms[unit.arm], benchmark.data[unit.data]
    fields = dict(arm.fields)
    if widths := fields.get("matryoshka_widths"):
        fields["matryoshka_widths"] = [*widths, data.d_sae]
    if (factor := pool_factor(arm, data, unit.k)) is not None:
        fields["pool_factor"] = factor
    fields |= {name: round(share * benchmark.steps) for name, share in arm.steps.items()}
    shared = {"d_in": data.features.hidden_dim, "d_sae": data.d_sae, "k": unit.k, "device": benchmark.device}
    config = arm.config(**shared, aux_loss_coefficient=benchmark.aux_loss_coefficient, **fields)
    return get_sae_training_class(config.architecture())[0](config)
