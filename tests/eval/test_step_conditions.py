"""Two measurements for SPEED.md: whether the bfloat16 scan keeps the same entries, and what the allocator gains."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from bench import allocator, kept_sets
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig

SETTING = {"tokens": 64, "d_in": 128, "d_sae": 256, "k": 4, "device": "cpu", "autocast": False, "dead": 0.0}
SETTING |= {"trained": False}


@pytest.mark.parametrize("rescale", [True, False])
def test_both_float32_choices_are_those_of_a_dense_product_in_float64(rescale):
    torch.manual_seed(0)
    fields = {"d_in": 24, "d_sae": 40, "k": 3, "pool_factor": None, "rescale_acts_by_decoder_norm": rescale}
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(**fields))
    sae.W_dec.data *= torch.rand(40, 1) + 0.5
    x = torch.randn(16, 24)
    pre = (sae.process_sae_in(x).double() @ sae.W_enc.double() + sae.b_enc.double()).detach()
    pre = pre * sae.W_dec.norm(dim=1).double().detach() if rescale else pre
    want = set(pre.flatten().topk(48).indices.tolist())
    by_products, by_dense, dense = kept_sets.float32_choices(sae, x)
    assert set(by_products.tolist()) == set(by_dense.tolist()) == want
    torch.testing.assert_close(dense, pre.flatten().float())


def test_a_kept_entry_that_a_choice_lacks_is_counted(monkeypatch):
    monkeypatch.setattr(kept_sets, "real_batches", lambda _: iter(torch.randn(2, 64, 128)))
    assert kept_sets.compare_kept_sets(SETTING, 2)["not_in_dense"] == 0
    right = kept_sets.float32_choices

    def wrong(sae, x):
        by_products, by_dense, dense = right(sae, x)
        return by_products[1:], by_dense, dense

    monkeypatch.setattr(kept_sets, "float32_choices", wrong)
    monkeypatch.setattr(kept_sets, "real_batches", lambda _: iter(torch.randn(2, 64, 128)))
    found = kept_sets.compare_kept_sets(SETTING, 2)
    assert (found["kept"], found["not_in_same_products"], found["not_in_dense"]) == (2 * 256, 2, 0)


def test_the_variables_reach_the_processes_in_turns(tmp_path, monkeypatch):
    seen = []

    class Process:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def apply(self, function, arguments):
            assert function is allocator.measure
            seen.append("MALLOC_MMAP_THRESHOLD_" in os.environ)
            return {"step_ms": {"side": float(len(seen))}}

    context = SimpleNamespace(Pool=lambda _: Process())
    monkeypatch.setattr(allocator.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr("sys.argv", ["allocator.py", "--turns", "3", "--out", str(tmp_path / "a.json")])
    allocator.main()
    assert seen == [False, True] * 3
    assert json.loads((tmp_path / "a.json").read_text())["step_ms"] == {"default": {"side": 3}, "kept": {"side": 4}}
