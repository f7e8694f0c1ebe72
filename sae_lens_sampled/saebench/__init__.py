"""SAEBench for SAEs of any SAELens architecture but Temporal, online or offline; requires the `eval` extra."""

try:
    import plotly  # noqa: F401
    import pydantic  # noqa: F401
    import sae_bench  # noqa: F401
    import threadpoolctl  # noqa: F401
except ModuleNotFoundError as error:
    package = "SAEBench" if error.name == "sae_bench" else error.name
    raise ModuleNotFoundError(
        f"sae_lens_sampled.saebench needs {package}: pip install 'sae-lens-sampled[eval]', or '.[eval]' in a "
        "clone (without a GPU, see docs/evaluation.md).",
        name=error.name,
    ) from error

from sae_lens_sampled.saebench.probing_data import ProbingDataset, load_probing_dataset
from sae_lens_sampled.saebench.report import write_report
from sae_lens_sampled.saebench.runner import EvalError, run_evals
from sae_lens_sampled.saebench.sources import load_saes, parse_source

__all__ = [
    "EvalError",
    "ProbingDataset",
    "load_probing_dataset",
    "load_saes",
    "parse_source",
    "run_evals",
    "write_report",
]
