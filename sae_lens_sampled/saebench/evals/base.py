"""Base class of evals, and the setup that the evals of a run share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE

from sae_lens_sampled.sae.inference import SampledTopKSAE
from sae_lens_sampled.saebench.models import EvalModel
from sae_lens_sampled.saebench.probing_data import ProbingDataset
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID, EvalSAE


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """Model, data and folders that the evals of one `run_evals` call share."""

    model: EvalModel
    output_dir: Path
    scratch: Path
    """Folder for temporary files, deleted when the run ends, even by an error."""
    device: str
    dtype: str
    """Name of the dtype of model and SAEs, as in SAEBench's `llm_dtype`."""
    d_sae: int
    """Width of the widest SAE."""
    seed: int
    text: str
    """Core's data set: Hub name or folder."""
    probing_datasets: list[ProbingDataset]

    @property
    def llm_batch_size(self) -> int:
        """Prompts per pass of the model: SAEBench's number for the model, or 32 if it has none."""
        return LLM_NAME_TO_BATCH_SIZE.get(self.model.name, 32)

    @property
    def artifacts(self) -> Path:
        """Folder for files that later runs reuse; the fingerprint in its name keeps different models apart."""
        return self.output_dir / "artifacts" / f"{self.model.name}_{self.model.fingerprint}".replace("/", "_")


class Eval:
    """One eval in one `run_evals` call. Subclasses set the class variables and override at least `run`."""

    name: ClassVar[str]
    """Key in `EVALS`, and name of the folder for its results."""
    config_class: ClassVar[type[Any]]
    """SAEBench's configuration, or another dataclass with a `model_name`; users may override its fields."""
    compares: ClassVar[bool] = False
    """Whether an SAE's result depends on the other SAEs."""
    reads_text: ClassVar[bool] = False
    """Whether the eval needs the data set `setup.text`."""
    reads_probing_datasets: ClassVar[bool] = False
    """Whether the eval needs labelled texts: `setup.probing_datasets`, or SAEBench's own if that is empty."""

    def __init__(self, setup: EvalSetup, overrides: Mapping[str, Any]) -> None:
        self.setup = setup
        self.config = self.config_class(**(self.defaults() | dict(overrides)))

    def defaults(self) -> dict[str, Any]:
        """Configuration fields that depend on the setup; the user's overrides take precedence."""
        return {"model_name": self.setup.model.name}

    def check(self, saes: Sequence[EvalSAE]) -> None:
        """Raise `ValueError` for SAEs that this eval does not support, before any work.

        Here for those that select over their batch, to which SAEBench adds padding.
        """
        for sae in saes:
            if isinstance(sae.sae, SampledTopKSAE):
                raise ValueError(  # noqa: TRY004  as for every other unsuitable SAE
                    f"{sae.name!r} is a SampledTopKSAE, which selects over its batch, to which {self.name} adds "
                    "padding; pass the folder of its training checkpoint, or the training SAE."
                )

    def inputs(self, saes: Sequence[EvalSAE]) -> dict[str, Any]:  # noqa: ARG002
        """Return what else a result depends on besides its SAE, the model and the configuration, for its fingerprint.

        An entry "config" replaces the configuration there.
        """
        return {}

    def prepare(self, saes: Sequence[EvalSAE]) -> None:
        """Do the work shared by `saes`: the SAEs to evaluate, or all with `compares` or `run_evals`' `prepare_only`."""

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        """Evaluate one SAE; return its result in SAEBench's format."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Folder into which SAEBench writes its own result files."""
        return self.setup.scratch / "results" / self.name

    def written(self, sae: EvalSAE) -> dict[str, Any]:
        """Read the result that SAEBench wrote into `folder` for an SAE passed to it as `(sae.name, sae.sae)`."""
        return json.loads((self.folder / f"{sae.name}_{CUSTOM_SAE_ID}_eval_results.json").read_text())
