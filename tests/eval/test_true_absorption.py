"""Absorption of known parent features by their children, compared with plain loops and hand-made SAEs."""

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import Hierarchy, HierarchyNode, SyntheticModel, SyntheticModelConfig, hierarchy_modifier
from sae_lens.util import temporary_seed

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from study.known_features import sample_with_features
from study.synthetic import evaluate_on_synthetic_data
from study.true_absorption import MIN_COSINE, SEED, children_of, true_absorption

FEATURES, WIDTH = 12, 16
PARENTS = {0: [1, 2], 3: [4, 5]}


def data(hierarchy: bool = True, width: int = WIDTH) -> SyntheticModel:
    """Two trees, each of a parent and two children, and six other features."""
    roots = [
        HierarchyNode(parent, [HierarchyNode(child) for child in children]) for parent, children in PARENTS.items()
    ]
    config = SyntheticModelConfig(num_features=FEATURES, hidden_dim=width, bias=False, seed=3)
    model = SyntheticModel(config, hierarchy=Hierarchy(roots, hierarchy_modifier(roots)) if hierarchy else None)
    model.activation_generator.firing_probabilities.fill_(0.5)
    return model


def by_hand(model: SyntheticModel, children_subtract: bool) -> JumpReLUSAE:
    """One latent per feature, orthogonal; with `children_subtract`, children silence their parents' latents."""
    vectors = torch.eye(FEATURES, WIDTH)
    model.feature_dict.feature_vectors.data = vectors
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=FEATURES))
    encoder = vectors.T.clone()
    for parent, children in PARENTS.items() if children_subtract else ():
        for child in children:
            encoder[child, parent] = -5
    sae.load_state_dict(
        {
            "W_enc": encoder,
            "W_dec": vectors,
            "b_enc": torch.zeros(FEATURES),
            "b_dec": torch.zeros(WIDTH),
            "threshold": torch.full((FEATURES,), 0.1),
        }
    )
    return sae


def test_children_are_the_nearest_features_below_a_feature():
    leaf = HierarchyNode(5)
    group = HierarchyNode(None, [HierarchyNode(2), HierarchyNode(None, [HierarchyNode(3, [leaf])])])
    roots = [HierarchyNode(0, [HierarchyNode(1), group]), HierarchyNode(None, [HierarchyNode(6)]), HierarchyNode(7)]
    assert children_of(roots) == {0: [1, 2, 3], 3: [5]}


@pytest.mark.parametrize(("children_subtract", "absorbed"), [(True, 1), (False, 0)])
def test_a_latent_that_a_child_silences_is_absorbed_and_another_is_not(children_subtract, absorbed):
    model = data()
    metrics = true_absorption(by_hand(model, children_subtract), model, 256, 64)
    assert metrics == {
        "parents_with_latent": 2,
        "recall_with_child": 1 - absorbed,
        "recall_without_child": 1,
        "absorbed": absorbed,
    }


def test_absorption_is_that_of_plain_loops():
    model = data(width=6)  # so narrow that latents also fire on other features, and not every parent has one
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=6, d_sae=5))
    sae.load_state_dict(
        {
            "W_enc": torch.randn(6, 5),
            "W_dec": torch.randn(5, 6) + model.feature_dict.feature_vectors[0],
            "b_enc": torch.zeros(5),
            "b_dec": torch.zeros(6),
            "threshold": torch.full((5,), 0.2),
        }
    )
    with temporary_seed(SEED):
        batches = [sample_with_features(model, n) for n in (100, 50)]
    recalls = []
    for parent, children in PARENTS.items():
        feature = model.feature_dict.feature_vectors[parent]
        cosines = [torch.cosine_similarity(row, feature, dim=0).item() for row in sae.W_dec]
        if max(cosines) <= MIN_COSINE:
            continue
        latent = cosines.index(max(cosines))
        fired = {True: [], False: []}
        for x, features in batches:
            for codes, row in zip(sae.encode(x).tolist(), features.tolist(), strict=True):
                if row[parent] > 0:
                    fired[any(row[child] > 0 for child in children)].append(codes[latent] > 0)
        recalls.append([sum(fired[kind]) / len(fired[kind]) for kind in (True, False)])
    assert len(recalls) == 1
    metrics = true_absorption(sae, model, 150, 100)
    assert metrics["parents_with_latent"] == 1
    assert [metrics["recall_with_child"], metrics["recall_without_child"]] == pytest.approx(recalls[0])
    assert metrics["absorbed"] == pytest.approx(recalls[0][1] - recalls[0][0])
    assert 0 < recalls[0][0] < 1


def test_without_latents_of_parents_there_are_no_means():
    model = data()
    sae = by_hand(model, children_subtract=False)
    sae.W_dec.data[list(PARENTS)] *= -1
    assert true_absorption(sae, model, 64, 64) == {"parents_with_latent": 0}


def test_it_is_left_out_without_a_hierarchy_and_changes_no_other_metric():
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=8, k=2))
    assert "absorbed" not in (metrics := evaluate_on_synthetic_data(sae, data(hierarchy=False), 64, 32, "cpu"))
    assert "parents_with_latent" not in metrics
    model, state = data(), torch.random.get_rng_state()
    true_absorption(sae, model, 64, 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert evaluate_on_synthetic_data(sae, model, 64, 32, "cpu")["parents_with_latent"] >= 0


def test_samples_in_parts_are_of_their_features():
    model = data()
    x, features = sample_with_features(model, 150)
    assert features.shape == (150, FEATURES)
    assert torch.allclose(x, features @ model.feature_dict.feature_vectors + model.feature_dict.bias, atol=1e-6)
    assert not torch.equal(features[:64], features[64:128])
