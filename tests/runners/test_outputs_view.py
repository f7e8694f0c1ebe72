"""`as_sae_on_outputs`: uses of the view other than passing it to SAELens' `run_evals`."""

import copy

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_sampled import SampledTopKTranscoder, SampledTopKTranscoderConfig, as_sae_on_outputs
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct

IN, OUT = "blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out"


@pytest.fixture
def model():
    shape = {"n_layers": 1, "d_model": 12, "n_ctx": 8, "d_head": 6, "n_heads": 2, "d_vocab": 9, "act_fn": "relu"}
    return HookedTransformer(HookedTransformerConfig(**shape, seed=0))


@pytest.fixture
def transcoder():
    fields = {"d_in": 12, "d_out": 12, "d_sae": 40, "k": 3, "hook_name_out": OUT}
    made = SampledTopKTranscoder(SampledTopKTranscoderConfig(**fields))
    made.cfg.metadata.hook_name, made.cfg.metadata.hook_name_out = IN, OUT
    return made


def test_called_it_reconstructs_the_outputs_from_the_inputs_that_passed(model, transcoder):
    with as_sae_on_outputs(transcoder, model) as view, torch.no_grad():
        _, cache = model.run_with_cache(torch.arange(6)[None], names_filter=[IN, OUT])
        got = view(cache[OUT])
        _, want = encode_and_reconstruct(transcoder, cache[IN])
        assert torch.equal(got, want)
        model(torch.arange(6)[None])
        assert torch.equal(view.forward(cache[OUT]), want)
        with pytest.raises(ValueError, match=r"^encode was called without new inputs"):
            view(cache[OUT])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_made_and_refuses_to_encode_what_never_passed_it(copied, model, transcoder):
    with as_sae_on_outputs(transcoder, model) as view:
        other = copied(view)
        assert other.cfg.metadata.hook_name == OUT
        assert torch.equal(other.W_dec, transcoder.W_dec)
        model(torch.arange(6)[None])
        with pytest.raises(ValueError, match=r"^encode was called without new inputs"):
            other.encode(torch.empty(0))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = view.nothing_of_the_kind
