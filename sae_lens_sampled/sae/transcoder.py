"""Transcoders: encode activations at one hook of a model and reconstruct those at another hook from the codes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    TranscoderConfig,
)
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_sampled.sae.checks import check_width
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig, check
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE


@dataclass(kw_only=True)
class SampledTopKTranscoderConfig(SampledTopKTrainingSAEConfig):
    """
    Configuration class for training a SampledTopKTranscoder (transcoders: arXiv 2406.11944).

    Fields inherited from SampledTopKTrainingSAEConfig are documented there. By default every latent is a candidate,
    which is BatchTopK.

    Args:
        d_out (int | None): Width of the outputs. None: `d_in`.
        hook_name_out (str | None): Hook of the outputs, such as "blocks.3.hook_mlp_out", for TranscoderRunner and
            evaluations; the hook of the inputs is the runner's `hook_name`. None: the caller makes the batches.
        skip (bool): Whether to add a linear map from inputs to outputs (arXiv 2501.18823), initialised to 0.
    """

    apply_b_dec_to_input: bool = False
    pool_factor: float | None = None
    d_out: int | None = None
    hook_name_out: str | None = None
    skip: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk_transcoder"

    @property
    @override
    def batch_parts(self) -> dict[str, int]:
        return {"d_in": self.d_in, "d_out": self.d_in if self.d_out is None else self.d_out}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hook_name_out is not None:
            self.metadata = copy.deepcopy(self.metadata)  # `dataclasses.replace` shares it between configs
            self.metadata.hook_name_out = self.hook_name_out
        check(
            not self.apply_b_dec_to_input,
            "apply_b_dec_to_input=True has no meaning for a transcoder: its decoder's bias belongs to the outputs. Use "
            "False.",
        )
        check(
            self.normalize_activations == "none",
            f"normalize_activations={self.normalize_activations!r} has no meaning for a transcoder: it would scale "
            "inputs and outputs, which are in two spaces, together. Use 'none'.",
        )
        check(
            self.reshape_activations == "none",
            f"reshape_activations={self.reshape_activations!r} merges the heads of one hook, but a transcoder "
            "has two hooks. Use 'none'.",
        )
        check(
            self.d_out is None or type(self.d_out) is int,
            f"d_out={self.d_out!r} is a {type(self.d_out).__name__}; it must be a whole number, or None for d_in.",
        )
        check(isinstance(self.skip, bool), f"skip={self.skip!r} must be True or False.")
        check(
            self.batch_parts["d_out"] >= 2,
            f"d_out={self.d_out} is less than 2: SAELens' auxiliary loss keeps d_out // 2 dead latents per token and "
            "divides by that number.",
        )

    @override
    def get_inference_config_class(self) -> type[TranscoderConfig]:
        return JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return super().get_inference_sae_cfg_dict() | {"d_out": self.batch_parts["d_out"]}


class SampledTopKTranscoder(SampledTopKTrainingSAE):
    r"""A transcoder with the pools, cutoff, thresholds and nested losses of SampledTopKTrainingSAE.

    For inputs $x$ and outputs $y$ of the same token, activations $z = \mathrm{relu}(x W_{enc} + b_{enc})$ are selected
    as in an SAE; $y$ is reconstructed as $\hat y = z W_{dec} + b_{dec}$, plus $x W_{skip}^T$ with `skip`. A training
    batch holds both side by side, `torch.cat([x, y], dim=-1)`; `encode` and `forward` take inputs only.

    With all latents as candidates, the default, it is a BatchTopK transcoder. It is exported as SAELens' JumpReLU
    transcoder, with `skip` as the skip variant.
    """

    cfg: SampledTopKTranscoderConfig  # type: ignore[assignment]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # The encoder is initialised as an SAE's; the decoder, in another space, gets directions of its own.
        W_dec = torch.empty(self.cfg.d_sae, self.cfg.batch_parts["d_out"], dtype=self.dtype, device=self.device)
        nn.init.kaiming_uniform_(W_dec)
        if self.cfg.decoder_init_norm is not None:
            W_dec *= self.cfg.decoder_init_norm / W_dec.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(W_dec.new_zeros(W_dec.shape[1]))
        if self.cfg.skip:
            self.W_skip = nn.Parameter(W_dec.new_zeros(W_dec.shape[1], self.cfg.d_in))

    @override
    def inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs, shape (..., d_in), and outputs, (..., d_out), of a training batch that holds them side by side.

        Raises:
            ValueError: if it is empty or has the wrong width.
        """
        check_width(batch, self.cfg.batch_parts)
        x, y = batch.split(list(self.cfg.batch_parts.values()), dim=-1)
        return super().inputs_and_targets(x)[0], y

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self.hook_sae_input(sae_in.to(self.dtype))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of the outputs, shape (..., d_out), for inputs of shape (..., d_in).

        Raises:
            ValueError: if `use_error_term` is set, or `x` is empty or not `d_in` wide, like a training batch, which
                has the outputs too.
        """
        if self.use_error_term:
            raise ValueError(
                "use_error_term=True has no meaning for a transcoder, which does not see its targets; set it to False."
            )
        return self.hook_sae_output(encode_and_reconstruct(self, x)[1])
