"""Cross-seed mean max cosine similarity (MMCS), which SAEBench lacks, in SAEBench's format."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import (
    DEFAULT_DISPLAY,
    BaseEvalConfig,
    BaseEvalOutput,
    BaseMetricCategories,
    BaseMetrics,
    BaseResultDetail,
)
from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
from torch import Tensor

from sae_lens_sampled.saebench.evals.base import Eval
from sae_lens_sampled.saebench.evals.core import Core
from sae_lens_sampled.saebench.results import NOT_COMPUTED, is_result_of, load_result, result_path
from sae_lens_sampled.saebench.sources import EvalSAE, seed_group
from sae_lens_sampled.similarity import MATCH_MAX_LATENTS, Similarity, are_signed, dictionary_similarity


@dataclass
class MmcsEvalConfig(BaseEvalConfig):
    """Settings of MMCS. It draws nothing at random and runs no model, so it has no seed, data set or batch size."""

    model_name: str = Field(default="", title="Model Name", description="Model of the SAEs; recorded, not loaded.")
    live_density: float = Field(
        default=0.0, title="Live Density", description="A latent is live if active on more than this share of tokens."
    )
    match_max_latents: int = Field(
        default=MATCH_MAX_LATENTS,
        title="Match Max Latents",
        description="Dictionaries with more latents are not matched one to one, which takes cubic time.",
    )


def _number(title: str, description: str, shown: bool = False) -> Any:
    return Field(
        default=None, title=title, description=description, json_schema_extra=DEFAULT_DISPLAY if shown else None
    )


@dataclass
class MmcsMetrics(BaseMetrics):
    """Similarity of one dictionary's rows to another dictionary, as in `similarity.OneWay`; None if not computed."""

    mmcs: float | None = _number("MMCS", "Mean over rows of the largest cosine with a row of the other", shown=True)
    mmcs_absolute: float | None = _number("Absolute MMCS", "As MMCS, with the largest absolute cosine")
    share_above_0_7: float | None = _number("Share Above 0.7", "Share of rows with a cosine above 0.7", shown=True)
    share_above_0_9: float | None = _number("Share Above 0.9", "Share of rows with a cosine above 0.9")
    baseline: float | None = _number("Baseline", "Expected MMCS with as many random directions", shown=True)
    baseline_absolute: float | None = _number("Absolute Baseline", "Expected absolute MMCS with random directions")
    matched: float | None = _number("Matched", "Mean absolute cosine of one-to-one pairs; None above match_max_latents")


@dataclass(kw_only=True)
class Similarities:
    """Similarities of two SAEs, by the rows compared; "reverse" means rows of the partner, found in this SAE.

    Live categories compare only the live latents of both SAEs; their fields are None if densities are unknown or an
    SAE has no live latents.
    """

    decoder: MmcsMetrics = Field(title="Decoder", description="Decoder rows", json_schema_extra=DEFAULT_DISPLAY)
    decoder_reverse: MmcsMetrics = Field(title="Reverse Decoder", description="Decoder rows of the partner")
    encoder: MmcsMetrics = Field(title="Encoder", description="Encoder directions")
    encoder_reverse: MmcsMetrics = Field(title="Reverse Encoder", description="Encoder directions of the partner")
    live_decoder: MmcsMetrics = Field(title="Live Decoder", description="Decoder rows of live latents")
    live_decoder_reverse: MmcsMetrics = Field(title="Reverse Live Decoder", description="The same for the partner")
    live_encoder: MmcsMetrics = Field(title="Live Encoder", description="Encoder directions of live latents")
    live_encoder_reverse: MmcsMetrics = Field(title="Reverse Live Encoder", description="The same for the partner")


CATEGORIES = tuple(field.name for field in fields(Similarities))


@dataclass
class MmcsPartnerMetrics(BaseMetrics):
    """Partners over which the means are taken."""

    n_partners: int = Field(title="Number of Partners", description="Number of SAEs over which the means are taken")
    partners_of_same_group: bool = Field(
        title="Partners of Same Group",
        description="Whether these are the other SAEs of the same group; if it has no others, all other SAEs are used",
    )
    n_live: int | None = _number("Live Latents", "Live latents of this SAE; None without densities")


@dataclass(kw_only=True)
class MmcsMetricCategories(Similarities, BaseMetricCategories):
    """Means over the partners."""

    partners: MmcsPartnerMetrics = Field(title="Partners", description="SAEs over which the means are taken")


@dataclass(kw_only=True)
class MmcsResultDetail(Similarities, BaseResultDetail):
    """The comparison with one other SAE."""

    partner: str = Field(title="Partner", description="Name of the other SAE, <release>_<sae_id>")
    same_group: bool = Field(title="Same Group", description="Whether both SAEs are in the same group")


@dataclass(config=ConfigDict(title="MMCS"))
class MmcsEvalOutput(BaseEvalOutput[MmcsEvalConfig, MmcsMetricCategories, MmcsResultDetail]):
    """How much of an SAE's dictionary recurs in other SAEs, such as seeds of the same configuration."""

    eval_config: MmcsEvalConfig
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: MmcsMetricCategories
    eval_result_details: list[MmcsResultDetail] = Field(
        default_factory=list,
        title="Per-Partner MMCS Results",
        description="Each object compares this SAE with one other SAE, in its group or not.",
    )
    eval_type_id: str = Field(default="mmcs", title="Eval Type ID", description="The type of the evaluation")


class Mmcs(Eval):
    """Similarity to other SAEs of the run: the mean over seeds of the same configuration, or else over all others."""

    name = "mmcs"
    config_class = MmcsEvalConfig
    compares = True

    def check(self, saes: Sequence[EvalSAE]) -> None:
        """Reject a single SAE, and SAEs that differ in width, hook or head."""
        if len(saes) < 2:
            raise ValueError("mmcs compares SAEs, so it needs at least two; leave it out for one.")
        check_alike(saes)

    def inputs(self, saes: Sequence[EvalSAE]) -> dict[str, Any]:
        """Return the fingerprints of all SAEs of the run, and the densities of their latents."""
        self.densities = {sae.name: self._density(sae) for sae in saes}
        return {
            "saes": {sae.name: sae.fingerprint for sae in saes},
            "densities": self.densities,
            "categories": CATEGORIES,  # so that results with other categories are recomputed
        }

    def prepare(self, saes: Sequence[EvalSAE]) -> None:
        """Compare all pairs of SAEs."""
        known = {name: density for name, density in self.densities.items() if density is not None}
        known = known if len(known) == len(saes) else {}
        self.outputs = compare_all(saes, self.config, self.setup.device, known)

    def run(self, sae: EvalSAE) -> dict[str, Any]:
        """Return the comparisons of one SAE with the others."""
        return asdict(self.outputs[sae.name])

    def _density(self, sae: EvalSAE) -> list[float] | None:
        """Share of tokens on which each latent is active, from core's result for this SAE; None if not computed."""
        result = load_result(result_path(self.setup.output_dir, Core.name, sae))
        if result is None or not is_result_of(result, sae, self.setup.model):
            return None
        densities = [latent["feature_density"] for latent in result["eval_result_details"]]
        return None if NOT_COMPUTED in densities else densities


def compare_all(
    saes: Sequence[EvalSAE], config: MmcsEvalConfig, device: str, densities: Mapping[str, Sequence[float]]
) -> dict[str, MmcsEvalOutput]:
    """Compare each SAE with every other one; return results by SAE name. Each pair is compared only once.

    The metrics of an SAE are means over the other SAEs of its group, or over all others if it is alone in its group;
    live metrics are means over the partners that have live latents. Only two SAEs need to be on `device` at a time.

    Args:
        saes: at least two SAEs.
        config: density above which latents are live, and size up to which dictionaries are matched.
        device: device to compute on.
        densities: share of tokens on which each latent is active, by SAE name; empty if unknown.
    """
    live = {name: torch.tensor(values, dtype=torch.double) > config.live_density for name, values in densities.items()}
    details: dict[str, list[MmcsResultDetail]] = {sae.name: [] for sae in saes}
    for a, b in combinations(saes, 2):
        forward, backward = _compare(a, b, live.get(a.name), live.get(b.name), config.match_max_latents, device)
        same_group = seed_group(a.name) == seed_group(b.name)
        details[a.name].append(MmcsResultDetail(partner=b.name, same_group=same_group, **forward))
        details[b.name].append(MmcsResultDetail(partner=a.name, same_group=same_group, **backward))
    eval_id = get_eval_uuid()
    return {
        sae.name: MmcsEvalOutput(
            eval_config=config,
            eval_id=eval_id,
            datetime_epoch_millis=int(time.time() * 1000),
            eval_result_metrics=_means(details[sae.name], live.get(sae.name)),
            eval_result_details=details[sae.name],
            sae_bench_commit_hash=get_sae_bench_version(),
            sae_lens_version=get_sae_lens_version(),
            sae_lens_id=sae.sae_id,
            sae_lens_release_id=sae.release,
            sae_cfg_dict=sae.sae.cfg.to_dict(),
        )
        for sae in saes
    }


def check_alike(saes: Sequence[EvalSAE]) -> None:
    """Reject SAEs that differ in widths, hooks or heads."""
    for field in ("d_sae", "d_in", "d_out", "hook_name", "hook_name_out", "hook_head_index"):
        of_metadata = field.startswith("hook")
        values = [getattr(sae.sae.cfg.metadata if of_metadata else sae.sae.cfg, field, None) for sae in saes]
        for sae, value in zip(saes, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{sae.name!r} has {field}={value!r}, but {saes[0].name!r} has {field}={values[0]!r}; "
                    "compare only SAEs of the same width, hook and head."
                )


def _compare(
    a: EvalSAE, b: EvalSAE, live_a: Tensor | None, live_b: Tensor | None, match_max_latents: int, device: str
) -> tuple[dict[str, MmcsMetrics], dict[str, MmcsMetrics]]:
    """Metrics by category: those of `a` with `b` as its partner, and those of `b` with `a` as its partner."""
    forward, backward, signed = {}, {}, are_signed(a.sae, b.sae)
    for part in ("decoder", "encoder"):
        rows_a, rows_b = _rows(a, part, device), _rows(b, part, device)
        similarity = dictionary_similarity(rows_a, rows_b, match_max_latents, signed)
        live = None
        if live_a is not None and live_b is not None and live_a.any() and live_b.any():
            live = similarity
            if not (live_a.all() and live_b.all()):
                rows_a, rows_b = rows_a[live_a.to(device)], rows_b[live_b.to(device)]
                live = dictionary_similarity(rows_a, rows_b, match_max_latents, signed)
        forward |= _categories(part, similarity, live)
        backward |= _categories(part, similarity.swapped(), live and live.swapped())
    return forward, backward


def _rows(sae: EvalSAE, part: str, device: str) -> Tensor:
    return (sae.sae.W_dec if part == "decoder" else sae.sae.W_enc.T).detach().to(device)


def _categories(part: str, similarity: Similarity, live: Similarity | None) -> dict[str, MmcsMetrics]:
    return {
        part: _metrics(similarity),
        f"{part}_reverse": _metrics(similarity.swapped()),
        f"live_{part}": _metrics(live),
        f"live_{part}_reverse": _metrics(live and live.swapped()),
    }


def _metrics(similarity: Similarity | None) -> MmcsMetrics:
    if similarity is None:
        return MmcsMetrics()
    return MmcsMetrics(**similarity.forward._asdict(), matched=similarity.matched)


def _means(details: Sequence[MmcsResultDetail], live: Tensor | None) -> MmcsMetricCategories:
    """Means over the partners of the same group, or over all partners if there are none."""
    same_group = [detail for detail in details if detail.same_group]
    partners = same_group or details
    return MmcsMetricCategories(
        **{category: _mean([getattr(detail, category) for detail in partners]) for category in CATEGORIES},
        partners=MmcsPartnerMetrics(
            n_partners=len(partners),
            partners_of_same_group=bool(same_group),
            n_live=None if live is None else int(live.sum()),
        ),
    )


def _mean(metrics: Sequence[MmcsMetrics]) -> MmcsMetrics:
    """Mean of each field over the partners that have a number for it."""
    means = {}
    for field in fields(MmcsMetrics):
        values = [value for partner in metrics if (value := getattr(partner, field.name)) is not None]
        means[field.name] = statistics.fmean(values) if values else None
    return MmcsMetrics(**means)
