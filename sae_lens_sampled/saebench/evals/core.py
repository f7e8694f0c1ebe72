"""SAEBench's core eval on one recording of the model per hook, and the metrics that `run_evals` adds."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sae_bench.evals.core.main as sae_bench_core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_sampled.metrics import ActivationStatistics
from sae_lens_sampled.runners.hooks import heads_side_by_side, switched_on
from sae_lens_sampled.runners.stores import reporting_short_text
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct
from sae_lens_sampled.saebench import patches, recording, shown_codes
from sae_lens_sampled.saebench.evals.base import Eval
from sae_lens_sampled.saebench.sources import EvalSAE
from sae_lens_sampled.saebench.top_contexts import TopActivations, top_contexts


@dataclass(frozen=True)
class Recorded:
    """An SAE's recording, and the SAE's indices in it."""

    recording: recording.Recording
    exported: int
    """Index of the SAE for inference."""
    in_training: int | None
    """Index of the training SAE, if given."""


class Core(Eval):
    """Sparsity and reconstruction of exported SAEs and, for given training SAEs, with the training-time selection."""

    name = "core"
    config_class = CoreEvalConfig
    reads_text = True

    def defaults(self) -> dict[str, Any]:
        """A tenth of the batches in SAEBench's scripts (200 and 2000), and all optional metrics."""
        return super().defaults() | {
            "llm_dtype": self.setup.dtype,
            "dataset": self.setup.text,
            "batch_size_prompts": 16,
            "n_eval_reconstruction_batches": 20,
            "n_eval_sparsity_variance_batches": 200,
            "exclude_special_tokens_from_reconstruction": True,
            "compute_featurewise_density_statistics": True,
            "compute_featurewise_weight_based_metrics": True,
        }

    def check(self, saes: Sequence[EvalSAE]) -> None:
        """Reject transcoders that cannot be recorded: SAEBench would have to run them, and knows one hook per SAE."""
        super().check(saes)
        for sae in saes:
            if isinstance(sae.sae, Transcoder) and not recording.is_shareable(sae.sae):
                raise ValueError(
                    f"{sae.name!r} is a transcoder from or to attention heads, which core cannot evaluate; leave core "
                    "out for it."
                )

    def inputs(self, saes: Sequence[EvalSAE]) -> dict[str, Any]:  # noqa: ARG002
        """Identify a text folder by its contents, not by its path."""
        text = Path(self.config.dataset)
        return {"config": asdict(self.config) | {"dataset": _fingerprint_files(text)}} if text.is_dir() else {}

    def prepare(self, saes: Sequence[EvalSAE]) -> None:
        """Record the model once for all SAEs with the same hooks and `prepend_bos`."""
        self.recorded: dict[str, Recorded] = {}
        by_site: dict[tuple[recording.Site, Any], list[EvalSAE]] = {}
        for sae in saes:
            if recording.is_shareable(sae.sae):
                by_site.setdefault((recording.site_of(sae.sae), sae.sae.cfg.metadata.prepend_bos), []).append(sae)
        for i, ((site, _), members) in enumerate(by_site.items()):
            self._record(site, members, self.setup.scratch / f"activations_{i}")

    def _record(self, site: recording.Site, saes: Sequence[EvalSAE], file: Path) -> None:
        hooked = self.setup.model.hooked
        with reporting_short_text(f"text={self.config.dataset!r}"):
            store = ActivationsStore.from_sae(
                hooked,
                saes[0].sae,
                context_size=self.config.context_size,
                dataset=self.config.dataset,
                dataset_trust_remote_code=True,
            )
        store.shuffle_input_dataset(seed=42)  # as core does
        # The training SAEs come last: core itself evaluates only the exported SAEs before them.
        training = {sae.name: sae.training_sae for sae in saes if sae.training_sae is not None}
        reconstructions = [functools.partial(_reconstruct, sae.sae) for sae in saes]
        reconstructions += [functools.partial(_reconstruct_selected, sae) for sae in training.values()]
        with switched_on(hooked, site.hooks), heads_side_by_side(hooked, site.hooks):
            recorded = recording.record(hooked, store, site, reconstructions, self.config, file)
        places = {name: len(saes) + i for i, name in enumerate(training)}
        self.recorded |= {sae.name: Recorded(recorded, i, places.get(sae.name)) for i, sae in enumerate(saes)}

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        """Return core's own result; if recorded, with statistics of the latents and of the training-time selection."""
        # An SAE that cannot be recorded: SAEBench runs the model itself, and nothing is added.
        if sae.name not in self.recorded:
            hooks = recording.site_of(sae.sae).hooks
            text = f"text={self.config.dataset!r} with context_size={self.config.context_size}"
            with (
                switched_on(self.setup.model.hooked, hooks),
                patches.core_errors_raised(text),
                shown_codes.magnitudes(sae.sae),
            ):
                self._run_sae_bench(sae)
            return self.written(sae)
        place = self.recorded[sae.name]
        _raise_failure(place.recording, place.exported)
        # Core on the recording, with statistics collected from the batches that it encodes.
        statistics = ActivationStatistics(sae.sae.W_dec.shape[1], sae.sae.cfg.d_sae, self.setup.device)
        top = TopActivations(sae.sae.cfg.d_sae, self.setup.device)

        def count(tokens: Tensor, y: Tensor, acts: Tensor, y_hat: Tensor) -> None:
            statistics.update(y, acts, y_hat)
            top.update(tokens, acts)

        with (
            shown_codes.magnitudes(sae.sae),  # before the observation, whose batches then have magnitudes too
            patches.two_widths(),
            recording.replay(place.recording, place.exported),
            recording.observed(place.recording, sae.sae, count),
        ):
            self._run_sae_bench(sae)
        extra: dict[str, Any] = {
            "exported": statistics.summary() | recording.mean_losses(place.recording, place.exported),
            "top_contexts": top_contexts(top, statistics, self.setup.model.hooked.tokenizer),
        }
        # The same metrics with the training-time selection.
        if sae.training_sae is not None and place.in_training is not None:
            _raise_failure(place.recording, place.in_training)
            losses = recording.mean_losses(place.recording, place.in_training)
            in_training = recording.statistics_in_training(place.recording, sae.training_sae)
            extra["in_training"] = in_training.summary() | losses
        result = self.written(sae)
        return result | {"eval_result_unstructured": (result.get("eval_result_unstructured") or {}) | extra}

    def _run_sae_bench(self, sae: EvalSAE) -> None:
        config = self.config
        sae_bench_core.multiple_evals(
            [(sae.name, sae.sae)],
            n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
            n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
            eval_batch_size_prompts=config.batch_size_prompts,
            compute_featurewise_density_statistics=config.compute_featurewise_density_statistics,
            compute_featurewise_weight_based_metrics=config.compute_featurewise_weight_based_metrics,
            exclude_special_tokens_from_reconstruction=config.exclude_special_tokens_from_reconstruction,
            dataset=config.dataset,
            context_size=config.context_size,
            output_folder=str(self.folder),
            dtype=config.llm_dtype,
            device=self.setup.device,
            force_rerun=True,
        )


def _reconstruct(sae: SAE[Any], x: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001  all tokens, as core does
    return encode_and_reconstruct(sae, x.to(sae.device))[1].to(x.device)


def _reconstruct_selected(sae: SAE[Any], x: Tensor, mask: Tensor) -> Tensor:
    """Reconstruct only the tokens of `mask`: in a selection over the batch, special tokens would take part."""
    selected = _reconstruct(sae, x[mask], mask)
    reconstruction = selected.new_zeros(*x.shape[:-1], selected.shape[-1])
    reconstruction[mask] = selected
    return reconstruction


def _raise_failure(recorded: recording.Recording, number: int) -> None:
    if number in recorded.failures:
        raise recorded.failures[number]


def _fingerprint_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]
