"""SAELens' runner for transcoders: it reads two hooks of the model, and evaluates replacements at the second."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens.HookedTransformer import HookedRootModule  # type: ignore[attr-defined]  # where SAELens has it
from typing_extensions import override

from sae_lens_sampled.runners.data_parallel import DataParallelRunner
from sae_lens_sampled.runners.hooks import heads_side_by_side, is_one_place, is_split, switch_on, switched_on
from sae_lens_sampled.runners.patches import adopt_store
from sae_lens_sampled.runners.resumable import ChangedModelEvaluator
from sae_lens_sampled.runners.run_checks import one_token
from sae_lens_sampled.sae.reconstruction import add_skip
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoder, SampledTopKTranscoderConfig


class TranscoderRunner(DataParallelRunner):
    """SAELens' runner with inputs at its `hook_name` and outputs at the `hook_name_out` of the transcoder's config.

    Everything else is as in `DataParallelRunner`, on one process or several: text, buffers, checkpoints, logging.
    Evaluations replace the activations at `hook_name_out` by their reconstruction.

    Raises:
        ValueError: at the start, as for `DataParallelRunner`; also if the config is not a transcoder's or has no
            `hook_name_out`, a hook is missing, does not run or is not as wide as the config says, the hooks have
            different numbers of tokens, run in the wrong order or are the same, `hook_head_index` is set, activations
            are to be read from a cache, the model cannot switch a hook on, or the given SAE is not a transcoder of
            these widths.
    """

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], *args: Any, **kwargs: Any) -> None:
        _check_config(cfg)
        super().__init__(cfg, *args, **kwargs)
        parts = self.sae.cfg.batch_parts if isinstance(self.sae, SampledTopKTranscoder) else None
        if parts != cfg.sae.batch_parts:
            has = "" if parts is None else f" with {parts}"
            raise ValueError(
                f"the SAE to train is a {type(self.sae).__name__}{has}, but the config asks for a transcoder with "
                f"{cfg.sae.batch_parts}; change one of the two."
            )
        hooks = [cfg.hook_name, cfg.sae.hook_name_out]
        if isinstance(self.model, HookedProxyLM):  # SAELens has set it up for the input hook only
            self.model = HookedProxyLM(self.model.model, self.model.tokenizer, hooks)
            self._compile_llm_if_needed()
        switch_on(self.model, hooks)
        check_outputs(self.model, cfg)
        self.activations_store.model = self.model
        read_both(self.activations_store, hooks, cfg.sae.batch_parts)
        self.evaluator.model = self.model
        self.evaluator = TranscoderEvaluator(**vars(self.evaluator))

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.hook_name_out = self.cfg.sae.hook_name_out


class TranscoderEvaluator(ChangedModelEvaluator):
    """SAELens' evaluation of the model with outputs reconstructed from inputs."""

    @override
    def changed(self, sae: TrainingSAE[Any]) -> AbstractContextManager[TrainingSAE[Any]]:
        return as_sae_on_outputs(sae, self.model)


class _StoreOfBoth(ActivationsStore):
    """Yields inputs and outputs side by side; mixing, filtering and resuming are SAELens' own."""

    @override
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        by_hook = self.get_multi_hook_activations(batch_tokens)
        assert self._hook_names is not None
        return torch.cat([by_hook[name].to(self.device, torch.float32) for name in self._hook_names], dim=-1)


class _OutputsSAE:
    """A transcoder as an SAE on its outputs, which encodes the inputs from the model's latest pass."""

    def __init__(self, transcoder: SAE[Any]) -> None:
        self.transcoder = transcoder
        self.passed: Tensor | None = None
        """Inputs that have passed the hook and are not encoded yet."""
        self.inputs = torch.empty(0)
        self.cfg = copy.deepcopy(transcoder.cfg)
        self.cfg.metadata.hook_name = self.cfg.metadata.hook_name_out

    def __getattr__(self, name: str) -> Any:
        if "transcoder" not in self.__dict__:  # as while it is being copied
            raise AttributeError(name)
        return getattr(self.transcoder, name)

    def __call__(self, _outputs: Tensor) -> Tensor:
        return self.decode(self.encode(_outputs))

    forward = __call__

    def encode(self, _outputs: Tensor) -> Tensor:
        if self.passed is None:
            raise ValueError("encode was called without new inputs: run the model before each call.")
        self.inputs, self.passed = self.passed.to(self.transcoder.device), None
        return self.transcoder.encode(self.inputs)

    def decode(self, acts: Tensor) -> Tensor:
        return add_skip(self.transcoder, self.inputs, self.transcoder.decode(acts))


@contextmanager
def as_sae_on_outputs(transcoder: SAE[Any], model: HookedRootModule) -> Iterator[Any]:
    """A transcoder as an SAE on its output hook (`hook_name_out` of its metadata), for SAELens' `run_evals` on `model`.

    Its `encode` must be called after a pass of the model and encodes the inputs of that pass, whatever its argument is.
    Weight-based metrics (`compute_featurewise_weight_based_metrics`) need inputs and outputs of the same width. Flags
    of the model that the hooks need are set inside the context.

    Raises:
        ValueError: if the metadata does not name both hooks, both names are of the same hook, or the model does not
            have a hook or cannot switch it on; in a pass of the model, if outputs come before inputs; in `encode`, if
            the model has not run since the last call.
    """
    hook_in, hook_out = hooks = hooks_of(transcoder)
    for name in hooks:
        if name not in model.hook_dict:
            raise ValueError(
                f"this {type(transcoder).__name__} uses hook {name!r}, which the model does not have; pass the model "
                "that it was trained on."
            )
    if is_one_place(model, hook_in, hook_out):
        raise ValueError(_told_of_one_place(hook_in, hook_out))
    view, have_come = _OutputsSAE(transcoder), False

    def remember(hook: Any, _arguments: Any, inputs: Tensor) -> None:
        nonlocal have_come
        view.passed, have_come = hook.hook_conversion.convert(inputs), True

    def check(_hook: Any, _arguments: Any) -> None:
        nonlocal have_come
        if not have_come:
            raise ValueError(
                f"{hook_out} comes before {hook_in}, but a transcoder's output hook must come after its input; correct "
                "the hooks in its metadata."
            )
        have_come = False

    whole = [hook_in] if is_split(hook_out) else hooks
    with switched_on(model, hooks), heads_side_by_side(model, whole):
        handles = [
            model.hook_dict[hook_in].register_forward_hook(remember),
            model.hook_dict[hook_out].register_forward_pre_hook(check),
        ]
        try:
            yield view
        finally:
            for handle in handles:
                handle.remove()


def _told_of_one_place(hook_in: str, hook_out: str) -> str:
    return (
        f"hook_name={hook_in!r} and hook_name_out={hook_out!r} are the same hook: train an SAE on it instead, with "
        "architecture sampled_topk, or name another hook_name_out."
    )


def hooks_of(transcoder: SAE[Any]) -> list[str]:
    """The transcoder's input and output hooks, from its metadata.

    Raises:
        ValueError: if one of them is not named there.
    """
    metadata = transcoder.cfg.metadata
    hooks = {name: getattr(metadata, name) for name in ("hook_name", "hook_name_out")}
    for name, hook in hooks.items():
        if hook is None:
            raise ValueError(unnamed_hook(transcoder, name))
    return list(hooks.values())


def unnamed_hook(sae: SAE[Any], name: str) -> str:
    """Error message for metadata that lacks the name of a hook."""
    return (
        f"the metadata of this {type(sae).__name__} has no {name}; set sae.cfg.metadata.{name} to the hook that it was "
        "trained on (for a saved SAE, in the metadata of its cfg.json)."
    )


def read_both(store: ActivationsStore, hooks: list[str], widths: dict[str, int]) -> None:
    """Make a store of one hook yield inputs and outputs side by side, shape (tokens, d_in + d_out)."""
    store._hook_names = hooks
    store._hook_d_ins = dict(zip(hooks, widths.values(), strict=True))
    store.d_in = sum(widths.values())
    adopt_store(store, _StoreOfBoth)


def _check_config(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    sae = cfg.sae
    if not isinstance(sae, SampledTopKTranscoderConfig):
        raise ValueError(  # noqa: TRY004  of a flag
            f"architecture={sae.architecture()!r} is not sampled_topk_transcoder, the only one that TranscoderRunner "
            "trains; use LanguageModelSAETrainingRunner."
        )
    if sae.hook_name_out is None:
        raise ValueError("hook_name_out is None; set it to the hook whose activations are to be reconstructed.")
    if cfg.hook_head_index is not None:
        raise ValueError(
            f"hook_head_index={cfg.hook_head_index} must be None for a transcoder, which reads whole hooks, not heads."
        )
    if cfg.use_cached_activations:
        raise ValueError("use_cached_activations=True caches one hook, but a transcoder reads two; set it to False.")


def check_outputs(model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Reject an output hook that the model does not have or that does not fit the input hook.

    Raises:
        ValueError: naming the hook and its width, number of tokens or place in the model.
    """
    name, width = cfg.sae.hook_name_out, cfg.sae.batch_parts["d_out"]
    cache = one_token(model, {cfg.hook_name: "hook_name", name: "hook_name_out"}, cfg.model_name, cfg.model_kwargs)
    inputs, outputs = cache[cfg.hook_name], cache[name]
    if is_one_place(model, cfg.hook_name, name):
        raise ValueError(_told_of_one_place(cfg.hook_name, name))
    if outputs.shape[:2] != inputs.shape[:2]:
        raise ValueError(
            f"{cfg.hook_name} and {name} have activations of shapes {tuple(inputs.shape)} and {tuple(outputs.shape)} "
            "for one token: a transcoder needs hooks with one row per token."
        )
    if outputs[0, 0].numel() != width:
        raise ValueError(f"d_out={width}, but {name} of {cfg.model_name} is {outputs[0, 0].numel()} wide; change one.")
    if next(iter(cache)) != cfg.hook_name:
        raise ValueError(
            f"{name} comes before {cfg.hook_name} in {cfg.model_name}, but a transcoder's output hook must come after "
            "its input hook; choose a later hook_name_out."
        )
