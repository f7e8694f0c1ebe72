"""Result file of the MMCS eval. `eval_output_schema_mmcs.json` is its schema, made as SAEBench makes its own."""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import (
    DEFAULT_DISPLAY,
    BaseEvalOutput,
    BaseMetricCategories,
    BaseMetrics,
    BaseResultDetail,
)

from sae_lens_sampled.saebench.mmcs.eval_config import MmcsEvalConfig

EVAL_TYPE_ID_MMCS = "mmcs"


@dataclass
class MmcsMetrics(BaseMetrics):
    """The fields of `dictionary_similarity.OneWay` from this SAE to its partners and, "reverse", from them to it.

    Those that begin with `live_` are over the live latents of both SAEs. They are None without densities, or if an SAE
    has no live latent.
    """

    mmcs: float = Field(
        title="MMCS",
        description="Mean over this SAE's latents of the largest cosine with a latent of the partner",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    mmcs_reverse: float = Field(
        title="Reverse MMCS", description="Mean over the partner's latents of the largest cosine with one of this SAE"
    )
    mmcs_absolute: float = Field(title="Absolute MMCS", description="As MMCS, of the largest absolute cosine")
    mmcs_absolute_reverse: float = Field(
        title="Reverse Absolute MMCS", description="As reverse MMCS, of the largest absolute cosine"
    )
    share_above_0_7: float = Field(
        title="Share Above 0.7",
        description="Share of this SAE's latents with a cosine above 0.7 with a latent of the partner",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    share_above_0_7_reverse: float = Field(
        title="Reverse Share Above 0.7", description="Share of the partner's latents found in this SAE above 0.7"
    )
    share_above_0_9: float = Field(
        title="Share Above 0.9",
        description="Share of this SAE's latents with a cosine above 0.9 with a latent of the partner",
    )
    share_above_0_9_reverse: float = Field(
        title="Reverse Share Above 0.9", description="Share of the partner's latents found in this SAE above 0.9"
    )
    baseline: float = Field(
        title="Baseline",
        description="Expected MMCS with random directions, as many as the partner has latents",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    baseline_reverse: float = Field(
        title="Reverse Baseline", description="Expected reverse MMCS with random directions for this SAE's latents"
    )
    baseline_absolute: float = Field(
        title="Absolute Baseline", description="Expected absolute MMCS with random directions for the partner's latents"
    )
    baseline_absolute_reverse: float = Field(
        title="Reverse Absolute Baseline",
        description="Expected reverse absolute MMCS with random directions for this SAE's latents",
    )
    matched: float | None = Field(
        default=None,
        title="Matched",
        description="Mean absolute cosine of latents matched one to one; None above match_max_latents",
    )
    live_mmcs: float | None = Field(default=None, title="Live MMCS", description="MMCS of live latents")
    live_mmcs_reverse: float | None = Field(
        default=None, title="Live Reverse MMCS", description="Reverse MMCS of live latents"
    )
    live_mmcs_absolute: float | None = Field(
        default=None, title="Live Absolute MMCS", description="Absolute MMCS of live latents"
    )
    live_mmcs_absolute_reverse: float | None = Field(
        default=None, title="Live Reverse Absolute MMCS", description="Reverse absolute MMCS of live latents"
    )
    live_share_above_0_7: float | None = Field(
        default=None, title="Live Share Above 0.7", description="Share above 0.7 of live latents"
    )
    live_share_above_0_7_reverse: float | None = Field(
        default=None, title="Live Reverse Share Above 0.7", description="Reverse share above 0.7 of live latents"
    )
    live_share_above_0_9: float | None = Field(
        default=None, title="Live Share Above 0.9", description="Share above 0.9 of live latents"
    )
    live_share_above_0_9_reverse: float | None = Field(
        default=None, title="Live Reverse Share Above 0.9", description="Reverse share above 0.9 of live latents"
    )
    live_baseline: float | None = Field(
        default=None, title="Live Baseline", description="Baseline for as many directions as live latents"
    )
    live_baseline_reverse: float | None = Field(
        default=None, title="Live Reverse Baseline", description="Reverse baseline for as many as live latents"
    )
    live_baseline_absolute: float | None = Field(
        default=None, title="Live Absolute Baseline", description="Absolute baseline for as many as live latents"
    )
    live_baseline_absolute_reverse: float | None = Field(
        default=None,
        title="Live Reverse Absolute Baseline",
        description="Reverse absolute baseline for as many as live latents",
    )
    live_matched: float | None = Field(
        default=None, title="Live Matched", description="Mean absolute cosine of live latents matched one to one"
    )


@dataclass
class MmcsPartnerMetrics(BaseMetrics):
    """What the means are over."""

    n_partners: int = Field(title="Number of Partners", description="SAEs that the means are over")
    partners_of_same_group: bool = Field(
        title="Partners of Same Group",
        description="Whether these are the others of the SAE's group; if it is alone there, they are all other SAEs",
    )
    n_live: int | None = Field(
        default=None, title="Live Latents", description="Live latents of this SAE; None without densities"
    )


@dataclass
class MmcsMetricCategories(BaseMetricCategories):
    """Means over the partners."""

    decoder: MmcsMetrics = Field(
        title="Decoder",
        description="Similarity of decoder rows, mean over the partners",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    encoder: MmcsMetrics = Field(
        title="Encoder", description="Similarity of the latents' encoder directions, mean over the partners"
    )
    partners: MmcsPartnerMetrics = Field(title="Partners", description="What the means are over")


@dataclass
class MmcsResultDetail(BaseResultDetail):
    """The comparison with one other SAE."""

    partner: str = Field(title="Partner", description="Name of the other SAE, <release>_<sae_id>")
    same_group: bool = Field(title="Same Group", description="Whether both SAEs are of one group")
    decoder: MmcsMetrics = Field(title="Decoder", description="Similarity of decoder rows")
    encoder: MmcsMetrics = Field(title="Encoder", description="Similarity of the latents' encoder directions")


@dataclass(config=ConfigDict(title="MMCS"))
class MmcsEvalOutput(BaseEvalOutput[MmcsEvalConfig, MmcsMetricCategories, MmcsResultDetail]):
    """How much of an SAE's dictionary is found again in other SAEs, such as seeds of the same configuration."""

    eval_config: MmcsEvalConfig
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: MmcsMetricCategories
    eval_result_details: list[MmcsResultDetail] = Field(
        default_factory=list,
        title="Per-Partner MMCS Results",
        description="Each object compares this SAE with one of the others, of its group or not.",
    )
    eval_type_id: str = Field(default=EVAL_TYPE_ID_MMCS, title="Eval Type ID", description="The type of the evaluation")
