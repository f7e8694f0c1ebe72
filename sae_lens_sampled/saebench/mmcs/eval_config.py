"""Configuration of the MMCS eval."""

from pydantic import Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import BaseEvalConfig

from sae_lens_sampled.dictionary_similarity import MATCH_MAX_LATENTS


@dataclass
class MmcsEvalConfig(BaseEvalConfig):
    """Nothing is random here and no model is run, so there is no seed, data set or batch size."""

    model_name: str = Field(
        default="", title="Model Name", description="Model that the SAEs are of. It is recorded only, and not loaded."
    )
    live_density: float = Field(
        default=0.0,
        title="Live Density",
        description="A latent is live if it is active on more than this share of tokens.",
    )
    match_max_latents: int = Field(
        default=MATCH_MAX_LATENTS,
        title="Match Max Latents",
        description="Dictionaries of more latents are not matched one to one: that takes cubic time.",
    )
