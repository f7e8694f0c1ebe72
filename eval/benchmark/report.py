"""The page about nested losses, `eval/NESTED.md`: tables over features and seeds, and answers looked up in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.configs import BENCHMARKS, PUBLISHED_16K
from benchmark.plan import Benchmark
from pages import markdown_table, render
from sae_lens_sampled.saebench.report.metrics import Estimate
from study import tables
from study.configs import STUDIES
from study.plan import GROUPED, pool_name
from study.storage import Key, ResultTable, Storage
from study.summary import Summary, mean_difference, mean_of, shown

TEMPLATE = Path(__file__).parent / "templates" / "nested.md"
COLUMNS = {
    "F1": "f1",
    "MCC": "mcc",
    "FVU": "fvu",
    "FVU in training": "fvu_in_training",
    "L0": "l0",
    "uniqueness": "uniqueness",
    "dead": "dead",
}
REPORTED = ("features_42", "features_43")
"""Data that are reported together."""


class BenchmarkSummary:
    """Results by data, k, arm and seed."""

    def __init__(self, benchmark: Benchmark, results: dict[Key, dict[str, Any]]) -> None:
        self.benchmark, self.results = benchmark, results

    def values(self, arm: str, k: int, metric: str, data: tuple[str, ...] = REPORTED) -> dict[tuple[str, int], float]:
        """Values by data and seed, of the SAEs that have the metric."""
        return {
            (of_data, seed): result["metrics"][metric]
            for (of_data, of_k, of_arm, seed), result in self.results.items()
            if of_data in data and of_k == k and of_arm == arm and metric in result["metrics"]
        }

    def mean(self, arm: str, k: int, metric: str, data: tuple[str, ...] = REPORTED) -> Estimate | None:
        """Mean over data and seeds."""
        return mean_of(self.values(arm, k, metric, data))

    def difference(
        self, arm: str, other: str, k: int, metric: str, data: tuple[str, ...] = REPORTED
    ) -> Estimate | None:
        """Mean of the differences of two arms that started from the same weights."""
        return mean_difference(self.values(arm, k, metric, data), self.values(other, k, metric, data))

    def table(
        self, k: int, data: tuple[str, ...] = REPORTED, published: Mapping[str, Mapping[str, float]] | None = None
    ) -> str:
        """All arms at one k, and what others published, by label and metric."""
        rows = [
            [arm.label, *(shown(self.mean(name, k, metric, data), metric) for metric in COLUMNS.values())]
            for name, arm in self.benchmark.arms.items()
            if self.values(name, k, "f1", data)
        ]
        for label, values in (published or {}).items():
            cells = [f"{values[metric]:.3f}" if metric in values else "-" for metric in COLUMNS.values()]
            rows.append([f"{label}, published", *cells])
        return markdown_table(["", *COLUMNS], rows)

    def causes_table(self, k: int = 4) -> str:
        """Matryoshka less BatchTopK, by kind of hierarchy and number of latents."""
        rows = []
        for names in (("features_42",), ("wide",), ("plain_hierarchy",), ("plain_hierarchy_wide",)):
            data = self.benchmark.data[names[0]]
            hierarchy = "plain" if "plain" in names[0] else "compensated, scaled by parent"
            differences = [
                shown(self.difference("matryoshka", "batchtopk", k, metric, names), metric, signed=True)
                for metric in ("f1", "mcc", "fvu")
            ]
            rows.append([hierarchy, str(data.d_sae), *differences])
        return markdown_table(["hierarchy", "d_sae", "F1", "MCC", "FVU"], rows)

    def seeds(self) -> str:
        """How many seeds there are of each dictionary of features, in words."""
        n_seeds = {data: len({key[3] for key in self.results if key[0] == data}) for data in REPORTED}
        return ", ".join(f"{n} seeds with {self.benchmark.data[data].label}" for data, n in n_seeds.items())


def write_nested_page(eval_folder: Path) -> Path:
    """Write the page."""
    page = eval_folder / "NESTED.md"
    page.write_text(render_nested_page(eval_folder / "results"))
    return page


def render_nested_page(results: Path) -> str:
    """The page, from the results of the small benchmark and its tuning, and of the study on the language model."""
    small, tuning, large = (
        BenchmarkSummary(BENCHMARKS[name], result_table(BENCHMARKS[name], results / f"benchmark_{name}").load())
        for name in ("small", "tuning", "synth-sae-bench-16k-cpu")
    )
    model = Summary(Storage(STUDIES["tiny"], results / "study_tiny", Path("study_output")))

    def number(arm: str, k: int, metric: str) -> str:
        return shown(small.mean(arm, k, metric), metric)

    def differences(arm: str, other: str, metric: str) -> str:
        """One for each k."""
        found = [small.difference(arm, other, k, metric) for k in small.benchmark.ks]
        return ", ".join(shown(difference, metric, signed=True) for difference in found)

    def on_model(arm: str, other: str, metric: str) -> str:
        return shown(model.difference(arm, other, metric), metric, signed=True)

    return render(
        TEMPLATE,
        small=small,
        tuning=tuning,
        large=large,
        published=PUBLISHED_16K,
        shuffled_groups=pool_name(model.study.fixed_pool_factor, GROUPED),
        model=model,
        tables=tables,
        number=number,
        differences=differences,
        on_model=on_model,
    )


def result_table(benchmark: Benchmark, folder: Path) -> ResultTable:
    """The results of a benchmark; a folder of other settings is refused."""
    fields = ("data", "k", "arm", "seed")
    return ResultTable(folder / "results.jsonl", fields, {"benchmark": benchmark.settings()}, "benchmark")
