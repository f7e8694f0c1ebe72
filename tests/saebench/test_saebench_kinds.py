"""SAEs of unusual kinds: what is refused, and that no number depends on how one and the same SAE is written."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from eval_helpers import D_IN, D_SAE, HOOK, TINY_LM, core_by_hand, exported, run_small
from sae_bench.sae_bench_utils import activation_collection
from sae_lens import (
    AbsTopKSAE,
    AbsTopKSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from sae_lens_sampled import SampledTopKSAE, SampledTopKSAEConfig
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct
from sae_lens_sampled.saebench import load_saes, shown_codes
from sae_lens_sampled.saebench.evals.core import _reconstruct_selected
from sae_lens_sampled.saebench.evals.mmcs import MmcsEvalConfig, check_alike, compare_all
from sae_lens_sampled.similarity import similarity_table


def metadata(hook=HOOK, **fields):
    return SAEMetadata(model_name=str(TINY_LM), hook_name=hook, context_size=48, prepend_bos=False, **fields)


def with_rows(sae, norm=1.0):
    """`sae` with decoder rows of `norm`, and an encoder that makes up for it."""
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    sae.W_enc.data[:], sae.W_dec.data[:] = (rows / norm).T, rows * norm
    return sae


def topk(norm):
    return with_rows(TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, metadata=metadata())), norm)


def abstopk(**fields):
    return with_rows(AbsTopKSAE(AbsTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, metadata=metadata(**fields))))


@pytest.mark.parametrize("hook", [HOOK, "blocks.2.attn.hook_z"])
def test_negative_activations_count_as_active(hook, tmp_path):
    sae = with_rows(AbsTopKSAE(AbsTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, metadata=metadata(hook))))
    [got] = run_small([("both_signs", sae)], ["core"], tmp_path)["core"].values()
    metrics = got["eval_result_metrics"]
    densities = torch.tensor([latent["feature_density"] for latent in got["eval_result_details"]])
    assert metrics["sparsity"]["l0"] == pytest.approx(8)
    assert densities.sum().item() == pytest.approx(8, rel=1e-4)
    by_hand = core_by_hand("both_signs", exported([("both_signs", sae)], "both_signs"), tmp_path / "by_hand")
    theirs = by_hand["eval_result_metrics"]
    assert metrics["reconstruction_quality"] == theirs["reconstruction_quality"]  # decoded with their signs
    assert sum(latent["feature_density"] for latent in by_hand["eval_result_details"]) < 6
    assert abs(theirs["sparsity"]["l1"]) < metrics["sparsity"]["l1"] / 2


def test_codes_that_depend_on_other_tokens_are_refused(tmp_path):
    sampled = SampledTopKSAE(SampledTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, pool_factor=5, metadata=metadata()))
    for name in ("core", "sparse_probing", "absorption"):
        with pytest.raises(ValueError, match=rf"^'a_custom_sae' is a SampledTopKSAE, .* {name} adds padding; pass"):
            run_small([("a", sampled), ("b", topk(1.0))], ["mmcs", name], tmp_path)
    assert run_small([("a", sampled), ("b", topk(1.0))], ["mmcs"], tmp_path)["mmcs"]  # compares only the weights
    sizes = {"d_in": D_IN, "d_sae": 256, "n_heads": 2, "bottleneck_factor": 32, "kval_topk": 8}
    temporal = TemporalSAE(TemporalSAEConfig(**sizes, metadata=metadata()))
    with pytest.raises(ValueError, match=r"a TemporalSAE predicts a part of its codes from earlier tokens, which"):
        load_saes([("temporal", temporal)])


def test_absorption_refuses_latents_that_fire_negatively(tmp_path):
    with pytest.raises(
        ValueError, match=r"^'both_custom_sae' is an AbsTopK SAE, but absorption takes .*; leave absorp"
    ):
        run_small([("both", abstopk())], ["absorption"], tmp_path)


def test_core_does_not_depend_on_how_the_norm_is_divided_between_codes_and_rows(tmp_path):
    results = run_small([("unit", topk(1.0)), ("scaled", topk(20.0))], ["core"], tmp_path)["core"]
    unit, scaled = (results[f"{name}_custom_sae"] for name in ("unit", "scaled"))
    for part in ("sparsity", "reconstruction_quality", "model_performance_preservation"):
        assert scaled["eval_result_metrics"][part] == pytest.approx(unit["eval_result_metrics"][part], rel=1e-3), part
    unit, scaled = (result["eval_result_unstructured"] for result in (unit, scaled))
    assert scaled["exported"]["fvu"] == pytest.approx(unit["exported"]["fvu"], rel=1e-4)
    largest = [[latent["contexts"][0]["activation"] for latent in of["top_contexts"]] for of in (unit, scaled)]
    assert largest[1] == pytest.approx(largest[0], rel=1e-3)


def test_codes_are_scaled_to_unit_rows_and_back():
    sae, x = topk(20.0), torch.randn(5, D_IN)
    sae.W_dec.data[3] = 0  # a row without a direction
    acts, reconstruction = sae.encode(x), sae(x)
    with shown_codes.unit_rows(sae):
        scaled = sae.encode(x)
        assert torch.allclose(sae.decode(scaled), reconstruction, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"^only the latest codes of an SAE can be decoded while"):
            sae.decode(acts)
    norms = torch.full((D_SAE,), 20.0)
    norms[3] = 1
    assert torch.allclose(scaled, acts * norms)
    assert torch.equal(sae.encode(x), acts)
    unit = topk(1.0)
    with shown_codes.unit_rows(unit):
        assert torch.equal(unit.encode(x), topk(1.0).encode(x))


def test_the_mass_of_a_training_sae_is_in_the_units_of_its_export(tmp_path):
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=1, metadata=metadata()))
    with_rows(sae, norm=torch.linspace(0.1, 4, D_SAE)[:, None])
    sae.W_enc.data[:] = torch.nn.functional.normalize(sae.W_enc.data, dim=0)
    [result] = run_small([("standard", sae)], ["core"], tmp_path)["core"].values()
    exported_, in_training = (result["eval_result_unstructured"][of] for of in ("exported", "in_training"))
    assert in_training["mass_by_density_decile"] == pytest.approx(exported_["mass_by_density_decile"], rel=1e-3)


def test_special_tokens_take_no_part_in_a_selection_over_the_batch():
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, metadata=metadata()))
    x, mask = torch.randn(3, 6, D_IN), torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0], x[:, 0] = False, 100 * x[:, 0]
    acts, want = encode_and_reconstruct(sae, x[mask])
    assert (acts != 0).sum() == 4 * 15
    got = _reconstruct_selected(sae, x, mask)
    assert torch.equal(got[mask], want)
    assert not torch.allclose(sae(x)[mask], want, atol=1e-3)


def test_sparse_codes_of_a_training_sae_are_returned_dense():
    config = TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, use_sparse_activations=True, metadata=metadata())
    sae, x = TopKTrainingSAE(config), torch.randn(5, D_IN)
    assert sae.encode(x).is_sparse
    acts, reconstruction = encode_and_reconstruct(sae, x)
    assert torch.equal(acts, sae.encode(x).to_dense())
    assert torch.allclose(reconstruction, sae.decode(acts), atol=1e-6)


def test_probing_averages_over_all_tokens_but_the_masked_ones():
    x = torch.randn(2, 4, 6)
    x[0, 1] = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5])  # as after a LayerNorm, whose outputs are centred
    x[:, 3] = 0
    sae = SimpleNamespace(dtype=torch.float32, encode=lambda x: x / x.norm(dim=-1, keepdim=True), decode=None)
    want = torch.stack([sae.encode(text[:3]).mean(dim=0) for text in x])
    with shown_codes.masked_tokens_only(sae):
        got = activation_collection.get_sae_meaned_activations({"a": x}, sae, 2)["a"]
        of_model = activation_collection.create_meaned_model_activations({"a": x})["a"]
    assert torch.allclose(got, want)
    assert torch.allclose(of_model, x[:, :3].mean(dim=1))
    assert activation_collection.get_sae_meaned_activations({"a": x}, sae, 2)["a"].isnan().any()


def test_rows_of_latents_that_fire_both_ways_have_no_sign():
    both = load_saes([("a_seed0", abstopk()), ("a_seed1", abstopk())])
    both[1].sae.W_dec.data[::2] *= -1
    both[1].sae.W_enc.data[:, ::2] *= -1
    metrics = compare_all(both, MmcsEvalConfig(), "cpu", {})["a_seed0_custom_sae"].eval_result_metrics
    for part in (metrics.decoder, metrics.encoder_reverse):
        assert (part.mmcs, part.share_above_0_9) == (pytest.approx(1), 1)
        assert part.baseline == part.baseline_absolute
    assert similarity_table({sae.name: sae.sae for sae in both}).count(" 1.000 ") == 2 * 6


def test_saes_on_different_heads_are_not_compared():
    heads = load_saes([(f"head{i}", abstopk(hook="blocks.2.attn.hook_q", hook_head_index=i)) for i in (0, 3)])
    with pytest.raises(
        ValueError, match=r"has hook_head_index=3, but 'head0_custom_sae' has hook_head_index=0; compare"
    ):
        check_alike(heads)
