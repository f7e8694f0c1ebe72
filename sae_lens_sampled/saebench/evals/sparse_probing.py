"""SAEBench's sparse probing, on SAEBench's own data sets or on the user's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sae_bench.evals.sparse_probing.main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

from sae_lens_sampled.runners.hooks import heads_side_by_side, switched_on
from sae_lens_sampled.saebench import patches, random_draws, shown_codes
from sae_lens_sampled.saebench.evals.base import Eval, EvalSetup
from sae_lens_sampled.saebench.probing_data import common_sizes
from sae_lens_sampled.saebench.sources import EvalSAE


class SparseProbing(Eval):
    """Accuracy of probes that read only a few latents."""

    name = "sparse_probing"
    config_class = SparseProbingEvalConfig
    reads_probing_datasets = True

    def __init__(self, setup: EvalSetup, overrides: Mapping[str, Any]) -> None:
        super().__init__(setup, overrides)
        self.random_states: dict[tuple[str, str], random_draws.RandomState] = {}
        """States of the random generators after the probes on the model, by data set and hook."""

    def defaults(self) -> dict[str, Any]:
        """SAEBench's settings; if the user gave data sets, those, with sizes that the smallest of them can fill."""
        fields = super().defaults() | {
            "random_seed": self.setup.seed,
            "llm_batch_size": self.setup.llm_batch_size,
            "llm_dtype": self.setup.dtype,
        }
        if self.setup.probing_datasets:
            usual = SparseProbingEvalConfig()
            sizes = common_sizes(self.setup.probing_datasets, usual.probe_train_set_size, usual.probe_test_set_size)
            fields |= dict(zip(("probe_train_set_size", "probe_test_set_size"), sizes, strict=True))
            fields["dataset_names"] = [dataset.name for dataset in self.setup.probing_datasets]
        return fields

    def inputs(self, saes: Sequence[EvalSAE]) -> dict[str, Any]:  # noqa: ARG002
        """Return all of the user's labelled texts."""
        return {"probing_datasets": [asdict(dataset) for dataset in self.setup.probing_datasets]}

    def check(self, saes: Sequence[EvalSAE]) -> None:
        """Reject SAEs on a single attention head, which SAEBench does not read."""
        super().check(saes)
        for sae in saes:
            head = sae.sae.cfg.metadata.hook_head_index
            if head is not None:
                raise ValueError(
                    f"SAE {sae.name!r} has hook_head_index={head}, but sparse probing reads whole hooks; leave "
                    "sparse_probing out for it."
                )

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        """Return SAEBench's result, which here does not depend on the other SAEs of the run."""
        sizes = (self.config.probe_train_set_size, self.config.probe_test_set_size)
        hooked, hooks = self.setup.model.hooked, [str(sae.sae.cfg.metadata.hook_name)]
        if sae.sae.hook_z_reshaping_mode:
            sae.sae.turn_off_forward_pass_hook_z_reshaping()  # the heads are side by side already
        with (
            switched_on(hooked, hooks),
            heads_side_by_side(hooked, hooks),
            patches.own_probing_datasets(self.setup.probing_datasets, sizes),
            random_draws.same_draws_for_every_sae(self.random_states),
            shown_codes.masked_tokens_only(sae.sae),
        ):
            sparse_probing.run_eval(
                self.config,
                [(sae.name, sae.sae)],
                self.setup.device,
                str(self.folder),
                force_rerun=True,
                # The model's activations, shared by the SAEs of this run and then deleted: SAEBench would reuse
                # them for any later model of this name.
                artifacts_path=str(self.setup.scratch / "sparse_probing"),
            )
        return self.written(sae)
