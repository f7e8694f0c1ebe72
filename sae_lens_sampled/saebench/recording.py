"""SAEBench's core eval for many SAEs, with one recording of the language model.

Most of core's time is spent running the model: for every SAE, three times over each batch of the reconstruction part
and once over each batch of the sparsity part. `record` makes the passes that do not depend on the SAE only once;
each SAE then needs one more pass over each reconstruction batch, or only its part after the hook. Core's own code runs
on each SAE with the recording in place of model and data (`replay`), and computes, averages and writes its results from
the same numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_sampled.files import reserve
from sae_lens_sampled.metrics import ActivationStatistics
from sae_lens_sampled.runners.hooks import is_split
from sae_lens_sampled.runners.stores import reporting_short_text
from sae_lens_sampled.sae.reconstruction import add_skip, encode_and_reconstruct
from sae_lens_sampled.saebench.patches import core_inputs
from sae_lens_sampled.saebench.shown_codes import sae_methods

Losses = dict[str, Tensor]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
"""Maps activations, shape (prompts, context, d_in), and the mask of tokens to replace to reconstructions."""


class Site(NamedTuple):
    """The hook that SAEs read and the hook that they reconstruct, which differ only for transcoders."""

    inputs: str
    outputs: str

    @property
    def hooks(self) -> list[str]:
        """Both hooks, or one if they are the same."""
        return list(dict.fromkeys(self))


@dataclass(frozen=True)
class Recording:
    """Tokens, losses and activations of the model on the evaluation text, shared by all SAEs of one site."""

    tokens: list[Tensor]
    """All batches: first those of the reconstruction part, then those of the sparsity part."""
    losses: list[list[Losses]]
    """Cross-entropy (without the last token) and KL divergence of tokens, by reconstruction batch and SAE."""
    activations: Tensor
    """Activations of the sparsity part, on disk, shape (batches, prompts, context, d_in). For transcoders the last
    dimension holds the outputs too, after the inputs."""
    d_in: int
    """Width of the activations that SAEs read."""
    ignored: set[int | None]
    """Special tokens, excluded from all metrics."""
    failures: dict[int, Exception]
    """Errors of SAEs that failed to reconstruct, by the SAE's index; these have no losses from that batch on."""

    def parts(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Split activations into inputs and outputs, which are the same unless the site is a transcoder's."""
        is_one = activations.shape[-1] == self.d_in
        return activations[..., : self.d_in], activations if is_one else activations[..., self.d_in :]


@torch.no_grad()
def record(
    model: HookedTransformer,
    store: ActivationsStore,
    site: Site,
    reconstructions: Sequence[Reconstruct],
    config: CoreEvalConfig,
    file: Path,
) -> Recording:
    """Run the model over all batches that core would draw from `store`, and compute the losses of `reconstructions`.

    Raises:
        ValueError: if the text gives no prompt.
        NoSpaceError: if the activations do not fit into `file`.
    """
    # Tokens of both parts; the sparsity part starts again from the beginning of the text.
    n_prompts, n_batches = config.batch_size_prompts, config.n_eval_sparsity_variance_batches
    with reporting_short_text(f"text={config.dataset!r}", store):
        reconstructed = [store.get_batch_tokens(n_prompts) for _ in range(config.n_eval_reconstruction_batches)]
        store.reset_input_dataset()
        encoded = [store.get_batch_tokens(n_prompts) for _ in range(n_batches)]
    # The sparsity part: activations. This comes first because they may not fit on the disk.
    activations, d_in = torch.empty(0), 0
    for i, tokens in enumerate(encoded):
        inputs, *outputs = _activations(model, tokens, site)
        x, d_in = torch.cat([inputs, *outputs], dim=-1), inputs.shape[-1]
        if i == 0:
            n_entries = n_batches * x.numel()
            reserve(file, n_entries * x.element_size(), "the activations that core records")
            activations = torch.from_file(str(file), shared=True, size=n_entries, dtype=x.dtype).view(-1, *x.shape)
        activations[i] = x
    # The reconstruction part: losses of every SAE.
    tokenizer: Any = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    excluded = ignored if config.exclude_special_tokens_from_reconstruction else set()
    failures: dict[int, Exception] = {}
    losses = [
        reconstruction_losses(model, tokens, site, reconstructions, excluded, failures) for tokens in reconstructed
    ]
    return Recording(reconstructed + encoded, losses, activations, d_in, ignored, failures)


@torch.no_grad()
def reconstruction_losses(
    model: HookedTransformer,
    tokens: Tensor,
    site: Site,
    reconstructions: Sequence[Reconstruct],
    excluded: set[int | None],
    failures: dict[int, Exception],
) -> list[Losses]:
    """Losses of each SAE as core's `get_recons_loss` returns them; those that no SAE changes are computed once.

    Operations and their order are core's, so results are bit-identical. The error of an SAE that raises is added to
    `failures`; its losses are empty, and later batches skip it.
    """
    # The unmodified model, and the model with zeros at the hook.
    kept: dict[str, Tensor] = {}
    logits, ce = _run_with_hooks(
        model,
        tokens,
        (site.inputs, lambda activations, hook: kept.update(x=activations)),  # noqa: ARG005
        (site.outputs, lambda activations, hook: kept.update(y=activations)),  # noqa: ARG005
    )
    ablation = (site.outputs, lambda activations, hook: torch.zeros_like(activations))  # noqa: ARG005
    ablated_logits, ablated_ce = _run_with_hooks(model, tokens, ablation)
    # Divergence of other logits from the model's own.
    mask = ~_is_any(tokens, excluded)
    probabilities = logits.softmax(dim=-1)
    log_probabilities = probabilities.log()

    def kl_divergence(other: Tensor) -> Tensor:
        # One prompt at a time fits in the CPU's cache: a third of the time, with bit-identical results.
        prompts = zip(probabilities, log_probabilities, other, strict=True)
        return torch.stack([(p * (log_p - q.softmax(dim=-1).log())).sum(dim=-1) for p, log_p, q in prompts])

    ablated_kl = kl_divergence(ablated_logits)
    # The model with each SAE's reconstruction at the hook, except at excluded tokens.
    losses = []
    for number, reconstruct in enumerate(reconstructions):
        try:
            x_hat = failures.get(number) or reconstruct(kept["x"], mask)
        except Exception as error:  # an SAE can fail in any way
            failures[number] = x_hat = error
        if isinstance(x_hat, Exception):
            losses.append({})
            continue
        x_hat = torch.where(mask[..., None], x_hat.to(kept["y"].dtype), kept["y"])
        new_logits, new_ce = _continue_from(model, tokens, site.outputs, x_hat)
        losses.append(
            {
                "kl_div_with_sae": kl_divergence(new_logits),
                "kl_div_with_ablation": ablated_kl,
                "ce_loss_with_sae": new_ce,
                "ce_loss_without_sae": ce,
                "ce_loss_with_ablation": ablated_ce,
            }
        )
    return losses


@contextmanager
def replay(recording: Recording, number: int) -> Iterator[None]:
    """Replace core's model and data by the recording; `number` is the SAE's index in `reconstructions` of `record`."""
    tokens = iter(recording.tokens)
    batches = iter(recording.activations)

    def run_with_cache(batch: Tensor, names_filter: list[str], **_kwargs: Any) -> tuple[None, dict[str, Tensor]]:
        return None, {names_filter[0]: recording.parts(next(batches).to(batch.device))[1]}

    special = sorted(token for token in recording.ignored if token is not None)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    tokenizer = SimpleNamespace(**dict(zip(names, itertools.cycle(special))))
    model = SimpleNamespace(run_with_cache=run_with_cache, tokenizer=tokenizer, to=lambda _dtype: model)

    def from_sae(*_args: Any, context_size: int, **_kwargs: Any) -> Any:
        return SimpleNamespace(
            context_size=context_size,
            shuffle_input_dataset=lambda seed: None,  # noqa: ARG005
            reset_input_dataset=lambda: None,
            get_batch_tokens=lambda _n_prompts: next(tokens),
        )

    with core_inputs(model, from_sae, [batch[number] for batch in recording.losses]):
        yield


@contextmanager
def observed(
    recording: Recording, sae: SAE[Any], on_batch: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Make `sae` encode the inputs of each replayed batch, although core passes the outputs, and report to `on_batch`.

    `on_batch` is called once per batch with tokens, outputs, latent activations and reconstructions, all without
    special tokens, so that further statistics need no second encoding.
    """
    encode, decode, batches = sae.encode, sae.decode, _sparsity_batches(recording)
    batch = next(batches)

    def encode_inputs(_outputs: Tensor) -> Tensor:
        return encode(batch.x.to(sae.device))

    def watched(acts: Tensor) -> Tensor:
        nonlocal batch
        reconstruction = add_skip(sae, batch.x.to(sae.device), decode(acts))
        keep = batch.keep
        on_batch(batch.tokens[keep], batch.y[keep].to(reconstruction), acts[keep], reconstruction[keep])
        batch = next(batches, batch)
        return reconstruction

    with sae_methods(sae, encode_inputs, watched):
        yield


@torch.no_grad()
def statistics_in_training(recording: Recording, sae: SAE[Any]) -> ActivationStatistics:
    """FVU, L0 and related metrics with the training-time selection, made over each batch without its special tokens."""
    result = ActivationStatistics(sae.W_dec.shape[1], sae.cfg.d_sae, sae.device)
    for batch in _sparsity_batches(recording):
        acts, reconstruction = encode_and_reconstruct(sae, batch.x[batch.keep].to(sae.device, sae.dtype))
        if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            acts = acts * sae.W_dec.norm(dim=-1)  # as in the export, whose decoder rows have unit norm
        result.update(batch.y[batch.keep].to(sae.device, sae.dtype), acts, reconstruction)
    return result


def mean_losses(recording: Recording, number: int) -> dict[str, float]:
    """Core's reconstruction metrics for one SAE, also for a training SAE, which core does not evaluate.

    Means are computed in float32 at least. Core computes them in the model's dtype: in bfloat16, a mean between 4 and 8
    is rounded to a multiple of 1/32.

    Args:
        recording: tokens and losses.
        number: the SAE's index in `reconstructions` of `record`; it must not be one of `recording.failures`.
    """
    sums: dict[str, list[Tensor]] = {}
    for tokens, losses in zip(recording.tokens, recording.losses, strict=False):
        mask = ~_is_any(tokens, recording.ignored)
        for name, value in losses[number].items():
            sums.setdefault(name, []).append(value[mask[:, : value.shape[1]]])
    all_of = {name: torch.cat(values) for name, values in sums.items()}
    means = {name: of.to(torch.promote_types(of.dtype, torch.float32)).mean().item() for name, of in all_of.items()}
    kl, ablated_kl = means["kl_div_with_sae"], means["kl_div_with_ablation"]
    ce, clean_ce, ablated_ce = (means[f"ce_loss_{name}"] for name in ("with_sae", "without_sae", "with_ablation"))
    return {
        "kl_div_with_sae": kl,
        "kl_div_score": (ablated_kl - kl) / ablated_kl,
        "ce_loss_with_sae": ce,
        "ce_loss_score": (ablated_ce - ce) / (ablated_ce - clean_ce),
    }


def site_of(sae: SAE[Any]) -> Site:
    """The hooks that an SAE or transcoder reads and reconstructs."""
    metadata = sae.cfg.metadata
    return Site(metadata.hook_name, metadata.hook_name_out if isinstance(sae, Transcoder) else metadata.hook_name)


def is_shareable(sae: SAE[Any]) -> bool:
    """Whether `record` supports this SAE: not on one attention head or a hook such as `hook_z`, which core reshapes."""
    return sae.cfg.metadata.hook_head_index is None and not any(map(is_split, site_of(sae)))


class _Batch(NamedTuple):
    tokens: Tensor
    x: Tensor
    y: Tensor
    keep: Tensor
    """Mask of the tokens that are not special."""


def _sparsity_batches(recording: Recording) -> Iterator[_Batch]:
    tokens = recording.tokens[-len(recording.activations) :]
    for batch, activations in zip(tokens, recording.activations, strict=True):
        yield _Batch(batch, *recording.parts(activations.to(batch.device)), ~_is_any(batch, recording.ignored))


def _activations(model: HookedTransformer, tokens: Tensor, site: Site) -> list[Tensor]:
    layer = max(int(hook.split(".")[1]) for hook in site.hooks)
    cache = model.run_with_cache(tokens, prepend_bos=False, names_filter=site.hooks, stop_at_layer=layer + 1)[1]
    return [cache[hook] for hook in site.hooks]


def _continue_from(model: HookedTransformer, tokens: Tensor, hook_name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and losses with `x` at the hook; after a block's output, only the later blocks are run if possible."""
    # With left padding the model builds its attention mask from the tokens, which it does only in full passes.
    if hook_name.endswith(".hook_resid_post") and model.tokenizer.padding_side != "left":  # type: ignore[union-attr]
        layer = int(hook_name.split(".")[1]) + 1
        return model(x, start_at_layer=layer, tokens=tokens, return_type="both", loss_per_token=True)
    return _run_with_hooks(model, tokens, (hook_name, lambda activations, hook: x))  # noqa: ARG005


def _run_with_hooks(model: HookedTransformer, tokens: Tensor, *hooks: Any) -> tuple[Tensor, Tensor]:
    """Logits and per-token losses."""
    return model.run_with_hooks(tokens, return_type="both", loss_per_token=True, fwd_hooks=[*hooks])


def _is_any(tokens: Tensor, values: set[int | None]) -> Tensor:
    result = torch.zeros_like(tokens, dtype=torch.bool)
    for value in values:
        if value is not None:
            result |= tokens == value
    return result
