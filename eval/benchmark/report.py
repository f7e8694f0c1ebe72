"""Results of the benchmarks on known features, read back: means, differences and tables over features and seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.plan import Benchmark
from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, difference_interval, holm, mean_interval
from study.storage import Key, ResultTable
from study.summary import shown

COLUMNS = {
    "F1": "f1",
    "MCC": "mcc",
    "FVU": "fvu",
    "FVU in training": "fvu_in_training",
    "L0": "l0",
    "uniqueness": "uniqueness",
    "dead": "dead",
}
COMPARED = {"F1": "f1", "MCC": "mcc", "FVU": "fvu", "dead": "dead", "absorbed": "absorbed"}
REPORTED = ("features_42", "features_43")
"""Data sets that are reported together."""


class BenchmarkSummary:
    """Results by data, k, arm and seed."""

    def __init__(self, benchmark: Benchmark, results: dict[Key, dict[str, Any]]) -> None:
        self.benchmark, self.results = benchmark, results

    def values(self, arm: str, k: int, metric: str, data: tuple[str, ...] = REPORTED) -> dict[tuple[str, int], float]:
        """Values by data and seed, for the SAEs that have the metric."""
        return {
            (of_data, seed): result["metrics"][metric]
            for (of_data, of_k, of_arm, seed), result in self.results.items()
            if of_data in data and of_k == k and of_arm == arm and metric in result["metrics"]
        }

    def mean(self, arm: str, k: int, metric: str, data: tuple[str, ...] = REPORTED) -> Interval | None:
        """Mean over data and seeds."""
        values = self.values(arm, k, metric, data)
        return mean_interval(list(values.values())) if values else None

    def difference(
        self, arm: str, other: str, k: int, metric: str, data: tuple[str, ...] = REPORTED
    ) -> Interval | None:
        """Mean difference of two arms over pairs of SAEs that started from the same weights; None without pairs."""
        return difference_interval(self.values(arm, k, metric, data), self.values(other, k, metric, data))

    def table(
        self, k: int, data: tuple[str, ...] = REPORTED, published: Mapping[str, Mapping[str, float]] | None = None
    ) -> str:
        """Markdown table of all arms at one k, and of published results by label and metric."""
        rows = [
            [arm.label, *(shown(self.mean(name, k, metric, data), metric) for metric in COLUMNS.values())]
            for name, arm in self.benchmark.arms.items()
            if self.values(name, k, "f1", data)
        ]
        for label, values in (published or {}).items():
            cells = [f"{values[metric]:.3f}" if metric in values else "-" for metric in COLUMNS.values()]
            rows.append([f"{label}, published", *cells])
        return markdown_table(["", *COLUMNS], rows)

    def interval(self, arm: str, k: int, metric: str) -> Interval | None:
        """Mean over dictionaries of features, each with one SAE."""
        values = self.values(arm, k, metric, tuple(self.benchmark.data))
        return mean_interval(list(values.values())) if values else None

    def interval_of_difference(self, arm: str, other: str, k: int, metric: str) -> Interval | None:
        """Mean difference of two arms over dictionaries of features; their SAEs share initial weights and samples."""
        data = tuple(self.benchmark.data)
        return difference_interval(self.values(arm, k, metric, data), self.values(other, k, metric, data))

    def difference_table(self, k: int, other: str = "batchtopk") -> str:
        """All arms minus `other`, whose row has its own values; bold: not 0 after Holm's correction over the table."""
        found = {
            (arm, metric): interval
            for arm in self.benchmark.arms
            for metric in COMPARED.values()
            if arm != other and (interval := self.interval_of_difference(arm, other, k, metric))
        }
        adjusted = holm({key: interval.p for key, interval in found.items() if interval.p is not None})

        def cell(arm: str, metric: str) -> str:
            if arm == other:
                return interval_text(self.interval(arm, k, metric))
            text = interval_text(found.get((arm, metric)), signed=True)
            return f"**{text}**" if adjusted.get((arm, metric), 1) <= 0.05 else text

        rows = [
            [self.benchmark.arms[arm].label, *(cell(arm, metric) for metric in COMPARED.values())]
            for arm in (other, *dict.fromkeys(arm for arm, _ in found))
        ]
        return markdown_table(["", *COMPARED], rows)

    def causes_table(self, k: int = 4) -> str:
        """Matryoshka minus BatchTopK, by kind of hierarchy and number of latents."""
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
        """Number of seeds for each dictionary of features, as text."""
        n_seeds = {data: len({key[3] for key in self.results if key[0] == data}) for data in REPORTED}
        return ", ".join(f"{n} seeds with {self.benchmark.data[data].label}" for data, n in n_seeds.items())


def result_table(benchmark: Benchmark, folder: Path) -> ResultTable:
    """The results of a benchmark; `load` and `append` raise a ValueError if the folder has other settings."""
    fields = ("data", "k", "arm", "seed")
    return ResultTable(folder / "results.jsonl", fields, {"benchmark": benchmark.settings()}, "benchmark")
