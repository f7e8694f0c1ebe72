"""SAEBench's evals as `run_evals` runs them. Another one takes an entry in `EVALS`."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sae_bench.evals.absorption.common as absorption_common
import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.core.main as core_main
import sae_bench.evals.sparse_probing.main as sparse_probing
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE
from torch import Tensor

import sae_lens_sampled.saebench.mmcs.main as mmcs
from sae_lens_sampled.activation_statistics import ActivationStatistics
from sae_lens_sampled.saebench import core, patches
from sae_lens_sampled.saebench.mmcs.eval_config import MmcsEvalConfig
from sae_lens_sampled.saebench.models import EvalModel
from sae_lens_sampled.saebench.probing_data import ProbingDataset, common_sizes
from sae_lens_sampled.saebench.results import is_result_of, load_result, result_path
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID, EvalSAE, fingerprint_tensors, seed_group
from sae_lens_sampled.saebench.top_contexts import TopActivations, top_contexts

Unstructured = dict[str, Any]


@dataclass
class Run:
    """What the evals of one `run_evals` share."""

    model: EvalModel
    output_dir: Path
    scratch: Path
    """Deleted when the run ends, however it ends."""
    device: str
    dtype: str
    d_sae: int
    """Of the widest SAE."""
    seed: int
    text: str
    probing_datasets: list[ProbingDataset]
    recordings: dict[str, tuple[core.Recording, int]] = field(default_factory=dict)
    """By the name of an SAE: the recording it is in, and its place there."""
    random_states: dict[tuple[str, str], patches.RandomState] = field(default_factory=dict)
    """By data set and hook: where sparse probing's generators are after the probes on the model."""

    @property
    def llm_batch_size(self) -> int:
        """Prompts per pass of the model, as SAEBench has it, or small enough for an unknown one."""
        return LLM_NAME_TO_BATCH_SIZE.get(self.model.name, 32)

    def density(self, sae: EvalSAE) -> list[float] | None:
        """Share of tokens that each latent is active on, if core was run on this SAE."""
        result = load_result(result_path(self.output_dir, "core", sae))
        if result is None or not is_result_of(result, sae, self.model):
            return None
        return [latent["feature_density"] for latent in result["eval_result_details"]]

    @property
    def artifacts(self) -> Path:
        """What later runs may use again; the fingerprint keeps another model's apart."""
        return self.output_dir / "artifacts" / f"{self.model.name}_{self.model.fingerprint}".replace("/", "_")


@dataclass(frozen=True)
class Eval:
    """How one eval is configured and run."""

    config: type[Any]
    """SAEBench's config class."""
    defaults: Callable[[Run], dict[str, Any]]
    """Fields that depend on the run; the user's own come after them."""
    run: Callable[[Any, EvalSAE, Run, Path], Unstructured]
    """Evaluates one SAE and has SAEBench write its result into the given folder. What it returns is added to it."""
    prepare: Callable[[Any, Sequence[EvalSAE], Run], None] = lambda config, saes, run: None  # noqa: ARG005
    """Work that is done once for all SAEs."""
    check: Callable[[Sequence[EvalSAE]], object] = lambda saes: None  # noqa: ARG005
    """Refuses SAEs that it cannot evaluate, before any work."""
    compares: bool = False
    """Whether an SAE's result depends on the other SAEs."""


def _core_defaults(run: Run) -> dict[str, Any]:
    return {
        "model_name": run.model.name,
        "llm_dtype": run.dtype,
        "dataset": run.text,
        "batch_size_prompts": 16,
        "n_eval_reconstruction_batches": 20,
        "n_eval_sparsity_variance_batches": 200,
        "exclude_special_tokens_from_reconstruction": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    }


def _prepare_core(config: CoreEvalConfig, saes: Sequence[EvalSAE], run: Run) -> None:
    groups: dict[tuple[Any, ...], list[EvalSAE]] = {}
    for sae in filter(lambda one: core.is_shareable(one.sae), saes):
        metadata = sae.sae.cfg.metadata
        groups.setdefault((metadata.hook_name, metadata.prepend_bos), []).append(sae)
    for i, ((hook_name, _), members) in enumerate(groups.items()):
        store = ActivationsStore.from_sae(
            run.model.hooked,
            members[0].sae,
            context_size=config.context_size,
            dataset=config.dataset,
            dataset_trust_remote_code=True,
        )
        store.shuffle_input_dataset(seed=42)  # as core does
        # The training SAEs come last: core itself asks for the first ones only.
        trained = [sae for sae in members if sae.training_sae is not None]
        each = [sae.sae for sae in members] + [sae.training_sae for sae in members if sae.training_sae is not None]
        reconstructions = [functools.partial(_reconstruct, one) for one in each]
        file = run.scratch / f"activations_{i}"
        recording = core.record(run.model.hooked, store, hook_name, reconstructions, config, file)
        run.recordings |= {sae.name: (recording, number) for number, sae in enumerate(members)}
        run.recordings |= {f"{sae.name} in training": (recording, len(members) + i) for i, sae in enumerate(trained)}


def _reconstruct(sae: SAE[Any], x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x.to(sae.device))).to(x.device)


def _run_core(config: CoreEvalConfig, sae: EvalSAE, run: Run, folder: Path) -> Unstructured:
    def multiple_evals() -> None:
        core_main.multiple_evals(
            [(sae.name, sae.sae)],
            n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
            n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
            eval_batch_size_prompts=config.batch_size_prompts,
            compute_featurewise_density_statistics=config.compute_featurewise_density_statistics,
            compute_featurewise_weight_based_metrics=config.compute_featurewise_weight_based_metrics,
            exclude_special_tokens_from_reconstruction=config.exclude_special_tokens_from_reconstruction,
            dataset=config.dataset,
            context_size=config.context_size,
            output_folder=str(folder),
            dtype=config.llm_dtype,
            device=run.device,
            force_rerun=True,
        )

    if sae.name not in run.recordings:
        with patches.core_errors_raised():
            multiple_evals()
        return {}
    recording, number = run.recordings[sae.name]
    if number in recording.failures:
        raise recording.failures[number]
    statistics = ActivationStatistics(sae.sae.cfg.d_in, sae.sae.cfg.d_sae, run.device)
    top = TopActivations(sae.sae.cfg.d_sae, run.device)

    def see(tokens: Tensor, x: Tensor, acts: Tensor, x_hat: Tensor) -> None:
        statistics.update(x, acts, x_hat)
        top.update(tokens, acts)

    with core.replay(recording, number), core.observed(recording, sae.sae, see):
        multiple_evals()
    extra: Unstructured = {
        "exported": statistics.summary(),
        "top_contexts": top_contexts(top, statistics, run.model.hooked.tokenizer),
    }
    if sae.training_sae is not None:
        recording, number = run.recordings[f"{sae.name} in training"]
        if number in recording.failures:
            raise recording.failures[number]
        losses = core.mean_losses(recording, number)
        extra["in_training"] = core.statistics_in_training(recording, sae.training_sae).summary() | losses
    return extra


def _sparse_probing_defaults(run: Run) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model_name": run.model.name,
        "random_seed": run.seed,
        "llm_batch_size": run.llm_batch_size,
        "llm_dtype": run.dtype,
    }
    if run.probing_datasets:
        usual = SparseProbingEvalConfig()
        sizes = common_sizes(run.probing_datasets, usual.probe_train_set_size, usual.probe_test_set_size)
        fields |= dict(zip(("probe_train_set_size", "probe_test_set_size"), sizes, strict=True))
        fields["dataset_names"] = [dataset.name for dataset in run.probing_datasets]
    return fields


def _run_sparse_probing(config: SparseProbingEvalConfig, sae: EvalSAE, run: Run, folder: Path) -> Unstructured:
    sizes = (config.probe_train_set_size, config.probe_test_set_size)
    with (
        patches.own_probing_datasets(run.probing_datasets, sizes),
        patches.same_draws_for_every_sae(run.random_states),
    ):
        sparse_probing.run_eval(
            config,
            [(sae.name, sae.sae)],
            run.device,
            str(folder),
            force_rerun=True,
            # Shared by the SAEs of this run and then dropped: SAEBench would use them for any later model of this name.
            artifacts_path=str(run.scratch / "sparse_probing"),
        )
    return {}


def _absorption_defaults(run: Run) -> dict[str, Any]:
    return {
        "model_name": run.model.name,
        "random_seed": run.seed,
        "llm_batch_size": run.llm_batch_size,
        "llm_dtype": run.dtype,
        "eval_k_sparse_probe_batch_size": 512,  # with SAEBench's 24 a small model takes hours; no number depends on it
        # Several times faster; takes words x d_sae numbers of memory.
        "precalc_k_sparse_probe_sae_acts": run.d_sae <= 16384,
    }


def _probes_folder(config: AbsorptionEvalConfig, run: Run) -> Path:
    """The probes of the model depend on the prompt and the seed too."""
    key = fingerprint_tensors({}, {"fields": [config.prompt_template, config.prompt_token_pos, config.random_seed]})
    return run.artifacts / "absorption" / f"probes_{key}"


def _prepare_absorption(config: AbsorptionEvalConfig, saes: Sequence[EvalSAE], run: Run) -> None:
    """Train the probes that are missing; a folder gets its name when all of it is there."""
    for layer in _absorption_layers(saes):
        place = Path(run.model.hooked.cfg.model_name) / f"layer_{layer}"
        final = _probes_folder(config, run) / place
        if final.exists():
            continue
        unfinished = run.scratch / "probes"
        with patches.restored_random_state(config.random_seed), patches.ordered_vocabulary():
            absorption_common.train_and_save_probes(
                run.model.hooked,
                [layer],
                base_template=config.prompt_template,
                pos_idx=config.prompt_token_pos,
                probes_dir=unfinished,
                device=run.device,
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / place, final)


def _absorption_layers(saes: Sequence[EvalSAE]) -> set[int]:
    layers = set()
    for sae in saes:
        hook_name = str(sae.sae.cfg.metadata.hook_name)
        if not hook_name.endswith(".hook_resid_post"):
            raise ValueError(
                f"SAE {sae.name!r} is of hook {hook_name!r}, but absorption always reads blocks.N.hook_resid_post, "
                "so its scores would mean nothing; leave absorption out for it."
            )
        layers.add(int(hook_name.split(".")[1]))
    return layers


def _run_absorption(config: AbsorptionEvalConfig, sae: EvalSAE, run: Run, folder: Path) -> Unstructured:
    work = run.scratch / "absorption" / sae.name
    folder.mkdir(parents=True, exist_ok=True)  # absorption does not, and fails when all work is done
    with patches.absorption_folders(_probes_folder(config, run), work), patches.ordered_vocabulary():
        results = absorption.run_eval(config, [(sae.name, sae.sae)], run.device, str(folder), force_rerun=True)
    if not results:
        raise ValueError(
            f"absorption found the first letter of a word in too few directions of model {run.model.name!r}: fewer "
            f"than min_feats_for_eval={config.min_feats_for_eval} letters have a probe with F1 above "
            f"min_GT_probe_f1={config.min_GT_probe_f1}. Use a larger model or a deeper layer, or lower these two."
        )
    return {}


def _mmcs_defaults(run: Run) -> dict[str, Any]:
    return {"model_name": run.model.name}


def _check_comparable(saes: Sequence[EvalSAE]) -> None:
    if len(saes) < 2:
        raise ValueError("mmcs compares SAEs, so it needs at least two; leave it out for one.")
    mmcs.check_alike([sae.name for sae in saes], [sae.sae for sae in saes])


def _prepare_mmcs(config: MmcsEvalConfig, saes: Sequence[EvalSAE], run: Run) -> None:
    names = {f"{sae.name}_{CUSTOM_SAE_ID}": sae for sae in saes}
    densities = {name: density for name, sae in names.items() if (density := run.density(sae)) is not None}
    mmcs.run_eval(
        config,
        [(sae.name, sae.sae) for sae in saes],
        run.device,
        str(run.scratch / "mmcs"),
        densities=densities if len(densities) == len(names) else None,
        groups={name: seed_group(sae.name) for name, sae in names.items()},
    )


def _run_mmcs(config: MmcsEvalConfig, sae: EvalSAE, run: Run, folder: Path) -> Unstructured:  # noqa: ARG001
    """All pairs were compared at once; take this SAE's result, and call its partners as their files are called."""
    file = f"{sae.name}_{CUSTOM_SAE_ID}_eval_results.json"
    result = json.loads((run.scratch / "mmcs" / file).read_text())
    for detail in result["eval_result_details"]:
        detail["partner"] = detail["partner"].removesuffix(f"_{CUSTOM_SAE_ID}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(result))
    return {}


EVALS: dict[str, Eval] = {
    "core": Eval(CoreEvalConfig, _core_defaults, _run_core, _prepare_core),
    "sparse_probing": Eval(SparseProbingEvalConfig, _sparse_probing_defaults, _run_sparse_probing),
    "absorption": Eval(
        AbsorptionEvalConfig, _absorption_defaults, _run_absorption, _prepare_absorption, _absorption_layers
    ),
    "mmcs": Eval(MmcsEvalConfig, _mmcs_defaults, _run_mmcs, _prepare_mmcs, _check_comparable, compares=True),
}
"""In the order in which they run: MMCS takes the densities of the latents from core."""
