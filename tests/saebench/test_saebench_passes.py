"""Passes of the language model: absorption's stop early and are not repeated, and every pass is shown."""

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from tqdm import tqdm

from sae_lens_sampled.saebench import patches, runner
from sae_lens_sampled.saebench.models import load_model

PROMPTS = ("old: O\nsea:", "sun: S\nday:")
POSITION = -2


@pytest.fixture(scope="module")
def model(tiny_lm):
    return load_model(tiny_lm)


@pytest.fixture
def whole_passes(model):
    """List with one entry per pass that continues after block 2."""
    calls = []
    handle = model.hooked.blocks[3].register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def at_the_word(model, layer):
    hook_name = f"blocks.{layer}.hook_resid_post"
    return model.hooked.run_with_cache(list(PROMPTS), names_filter=[hook_name])[1][hook_name][:, POSITION, :]


def test_absorption_reads_the_same_bits_from_short_passes_and_from_memory(model, whole_passes, monkeypatch):
    want = {layer: at_the_word(model, layer) for layer in (1, 2)}
    assert len(whole_passes) == 2
    memory = {}
    with patches.short_passes(model.hooked, POSITION, memory):
        assert all(torch.equal(at_the_word(model, layer), acts) for layer, acts in want.items())
        assert len(memory) == 2
        with patches.tokens_counted(model.hooked, lambda n_tokens: pytest.fail("the model ran again")):
            assert all(torch.equal(at_the_word(model, layer), acts) for layer, acts in want.items())
    assert len(whole_passes) == 2  # no further ones
    assert not torch.equal(want[1], want[2])
    with patches.short_passes(model.hooked, POSITION):
        assert torch.equal(at_the_word(model, 1), want[1])


def test_every_pass_is_counted_once(model):
    counts = []
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with patches.tokens_counted(model.hooked, counts.append):
        model.hooked(tokens)
        model.hooked(tokens[:, :3], return_type="both")
        _, cache = model.hooked.run_with_cache(tokens, stop_at_layer=2, names_filter=["blocks.1.hook_resid_post"])
        model.hooked(cache["blocks.1.hook_resid_post"], start_at_layer=2, tokens=tokens)
        model.hooked.run_with_hooks(tokens, stop_at_layer=1)  # as sparse probing does
    model.hooked(tokens)
    assert counts == [10, 6, 10, 10, 10]


def test_the_bar_says_what_is_done_and_how_far_it_is(model, monkeypatch):
    monkeypatch.setattr(runner.time, "monotonic", iter(range(0, 100, 2)).__next__)
    with tqdm(total=1) as bar, runner._tokens_shown(model, bar, "core: language model"):
        assert bar.postfix == "core: language model"
        for _ in range(2):
            model.hooked(torch.zeros(300, 5, dtype=torch.long))
        assert bar.postfix == "core: language model, 3,000 tokens"
