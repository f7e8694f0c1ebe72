"""SAEBench's absorption eval, with probes on the model that later runs reuse."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sae_bench.evals.absorption.common as absorption_common
import sae_bench.evals.absorption.main as absorption
from filelock import FileLock
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_lens.saes.abstopk_sae import AbsTopKSAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_sampled.files import atomic_rename
from sae_lens_sampled.saebench import patches, random_draws
from sae_lens_sampled.saebench.evals.base import Eval, EvalSetup
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID, EvalSAE, fingerprint_tensors

LOCK = "absorption.lock"


class Absorption(Eval):
    """How far other latents stand in for the latents of a first letter, on words that begin with it."""

    name = "absorption"
    config_class = AbsorptionEvalConfig

    def __init__(self, setup: EvalSetup, overrides: Mapping[str, Any]) -> None:
        super().__init__(setup, overrides)
        self.activations: dict[tuple[str, ...], Tensor] = {}
        """Activations of the model by hook and prompts of a batch, shared by all SAEs, which get the same prompts."""

    def defaults(self) -> dict[str, Any]:
        """SAEBench's settings with those of the setup, and two that make small models fast."""
        return super().defaults() | {
            "random_seed": self.setup.seed,
            "llm_batch_size": self.setup.llm_batch_size,
            "llm_dtype": self.setup.dtype,
            # With SAEBench's 24 a small model takes hours; results do not depend on this size.
            "eval_k_sparse_probe_batch_size": 512,
            # Several times faster, but needs memory for words x d_sae numbers.
            "precalc_k_sparse_probe_sae_acts": self.setup.d_sae <= 16384,
        }

    def check(self, saes: Sequence[EvalSAE]) -> None:
        """Reject transcoders, AbsTopK SAEs, and SAEs on hooks that absorption would not read."""
        super().check(saes)
        for sae in saes:
            if isinstance(sae.sae, AbsTopKSAE):
                raise ValueError(  # noqa: TRY004  as for every other unsuitable SAE
                    f"{sae.name!r} is an AbsTopK SAE, but absorption takes latents with negative activations as "
                    "inactive; leave absorption out for it."
                )
            if isinstance(sae.sae, Transcoder):
                raise ValueError(  # noqa: TRY004  as for every other unsuitable SAE
                    f"{sae.name!r} is a transcoder; absorption compares decoder rows with probes on the activations "
                    "that are encoded, but a transcoder reconstructs others. Leave absorption out for it."
                )
            hook_name = str(sae.sae.cfg.metadata.hook_name)
            if not hook_name.endswith(".hook_resid_post"):
                raise ValueError(
                    f"SAE {sae.name!r} uses hook {hook_name!r}, but absorption always reads blocks.N.hook_resid_post, "
                    "so its scores would be meaningless; leave absorption out for it."
                )

    def prepare(self, saes: Sequence[EvalSAE]) -> None:
        """Train the probes that are missing; one process trains them while the others wait."""
        for layer in {int(str(sae.sae.cfg.metadata.hook_name).split(".")[1]) for sae in saes}:
            folder = self._probes / self.setup.model.hooked.cfg.model_name / f"layer_{layer}"
            with FileLock(self.setup.output_dir / "artifacts" / LOCK):
                if not folder.exists():
                    self._train_probes(layer, folder)

    def _train_probes(self, layer: int, folder: Path) -> None:
        """Train the probes of a layer; `folder` is created only once they are complete."""
        hooked, unfinished = self.setup.model.hooked, self.setup.scratch / "probes"
        with (
            random_draws.restored_random_state(self.config.random_seed),
            patches.ordered_vocabulary(),
            patches.reserved_memory_maps(),
            patches.short_passes(hooked, self.config.prompt_token_pos),
        ):
            absorption_common.train_and_save_probes(
                hooked,
                [layer],
                base_template=self.config.prompt_template,
                pos_idx=self.config.prompt_token_pos,
                probes_dir=unfinished,
                device=self.setup.device,
            )
        atomic_rename(unfinished / hooked.cfg.model_name / f"layer_{layer}", folder)

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        """Return SAEBench's result with recalls by letter; raise `ValueError` if too few letters have a good probe."""
        work = self.setup.scratch / "absorption" / sae.name
        self.folder.mkdir(parents=True, exist_ok=True)  # absorption does not, and would fail at the end, when it writes
        hooked, position = self.setup.model.hooked, self.config.prompt_token_pos
        with (
            patches.absorption_folders(self._probes, work),
            patches.ordered_vocabulary(),
            patches.short_passes(hooked, position, self.activations),
        ):
            results = absorption.run_eval(
                self.config, [(sae.name, sae.sae)], self.setup.device, str(self.folder), force_rerun=True
            )
        if not results:
            raise ValueError(
                f"absorption cannot be measured on model {self.setup.model.name!r}: fewer than "
                f"min_feats_for_eval={self.config.min_feats_for_eval} letters have a probe with F1 above "
                f"min_GT_probe_f1={self.config.min_GT_probe_f1}. Use a larger model or a deeper layer, or lower these "
                "two settings."
            )
        result = self.written(sae)
        letters = {detail["first_letter"] for detail in result["eval_result_details"]}
        return result | {"eval_result_unstructured": {"letters": self._recall(sae, letters)}}

    def _recall(self, sae: EvalSAE, letters: set[str]) -> dict[str, dict[str, float]]:
        """Two recalls by letter, over SAEBench's test words that begin with the letter.

        They are the shares of these words that the letter's probe detects, and on which the latent that predicts the
        letter best is active.
        """
        # SAEBench writes this file into its working directory.
        file = self.setup.scratch / "artifacts" / "absorption" / f"{sae.name}_{CUSTOM_SAE_ID}_k_sparse_probing.json"
        return {
            row["letter"]: {"recall_probe": row["recall_probe"], "recall_best_latent": row["recall_sum_sparse_sae_1"]}
            for row in json.loads(file.read_text())
            if row["letter"] in letters
        }

    @property
    def _probes(self) -> Path:
        """Folder for the probes on the model, named by prompt, token position and seed, on which they also depend."""
        config = self.config
        key = fingerprint_tensors({}, {"fields": [config.prompt_template, config.prompt_token_pos, config.random_seed]})
        return self.setup.artifacts / "absorption" / f"probes_{key}"
