"""A complete custom eval: the largest decoder bias times a factor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sae_lens_sampled.saebench.evals import Eval
from sae_lens_sampled.saebench.sources import EvalSAE


@dataclass
class BiasConfig:
    model_name: str
    factor: float = 2.0


class Bias(Eval):
    name = "bias"
    config_class = BiasConfig
    calls: ClassVar[list[str]] = []

    def inputs(self, saes: Sequence[EvalSAE]) -> dict[str, Any]:
        self.calls.append("inputs")
        return {"seed": self.setup.seed}

    def prepare(self, saes: Sequence[EvalSAE]) -> None:
        self.calls.append(f"prepare {len(saes)}")

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        self.calls.append(sae.name)
        return {
            "eval_type_id": self.name,
            "eval_config": {"model_name": self.config.model_name, "factor": self.config.factor},
            "eval_result_metrics": {"bias": {"largest": sae.sae.b_dec.max().item() * self.config.factor}},
            "sae_cfg_dict": sae.sae.cfg.to_dict(),
        }
