import re

import pytest
from helpers import config
from sae_lens import JumpReLUSAEConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from sae_lens_sampled import SampledTopKTrainingSAEConfig


@pytest.mark.conformance(2)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0 must be above 0 and at most d_sae=40."),
        ({"k": -1.5}, "k=-1.5 must be above 0 and at most d_sae=40."),
        ({"k": 41}, "k=41 must be above 0 and at most d_sae=40."),
        ({"k": float("nan")}, "k=nan must be above 0"),
        ({"pool_factor": 0.9}, "pool_factor=0.9 must be at least 1: the k=3 entries kept per"),
        ({"pool_factor": float("nan")}, "With None (inf on the command line) every latent is a candidate."),
        ({"score": "l3"}, "score='l3' must be one of l2_norm, squared_l2, entropy, perplexity, frequency, "),
        ({"score": "uniform"}, "pool_sampling='top' cannot rank them; use pool_sampling='proportional'."),
        ({"pool_sampling": "random"}, "pool_sampling='random' must be one of top, proportional."),
        ({"pool_group_size": 0}, "pool_group_size=0 must be at least 1 token, or None for one pool per batch."),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' does not work with SAELens'"),
        ({"pool_group_size": 16.5}, "pool_group_size=16.5 is a float; it must be a whole number of tokens, or None"),
        ({"pool_group_size": "16"}, "pool_group_size='16' is a str; it must be a whole number of tokens"),
        ({"pool_group_size": True}, "pool_group_size=True is a bool; it must be a whole number of tokens"),
        ({"pool_factor": "four"}, "pool_factor='four' is a str; it must be a number, or None for every latent."),
        ({"k": "8"}, "k='8' is a str; it must be a number."),
        ({"pool_seed": 0.5}, "pool_seed=0.5 is a float; it must be a whole number."),
        ({"pool_steps": 0}, "pool_steps=0 must be a whole number of training steps, at least 1, or None for all."),
        ({"pool_steps": 2.5}, "pool_steps=2.5 must be a whole number of training steps"),
        ({"pool_steps": True}, "pool_steps=True must be a whole number of training steps"),
        ({"pool_steps": "9"}, "pool_steps='9' must be a whole number of training steps"),
        (
            {"pool_steps": 9, "pool_factor": None},
            "pool_steps=9 has no effect with pool_factor=None: each of the d_sae=40 latents is a candidate from the "
            "first step. Leave out pool_steps or change pool_factor.",
        ),
        ({"pool_steps": 9, "pool_factor": 13.2}, "pool_steps=9 has no effect with pool_factor=13.2: each"),
        ({"score": None}, "score=None is a NoneType; it must be the name of a score."),
    ],
)
def test_impossible_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_defaults_are_the_papers():
    cfg = SampledTopKTrainingSAEConfig(d_in=64, d_sae=1024)
    assert (cfg.score, cfg.pool_sampling, cfg.pool_group_size) == ("l2_norm", "top", None)
    assert cfg.aux_loss_coefficient == 1 / 32
    assert 3 <= cfg.pool_factor <= 5


@pytest.mark.conformance(2)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"k": 2.5, "pool_factor": 1.5, "pool_steps": 7},
        {"score": "uniform", "pool_sampling": "proportional", "pool_group_size": 16},
    ],
)
def test_dict_round_trip_keeps_class_and_fields(fields):
    cfg = config(**fields)
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert type(again) is SampledTopKTrainingSAEConfig
    assert again.to_dict() == cfg.to_dict()


def test_fields_are_checked_when_a_dict_is_read():
    with pytest.raises(ValueError, match=r"pool_factor=0\.1 must be at least 1"):
        TrainingSAEConfig.from_dict({**config().to_dict(), "pool_factor": 0.1})


def test_an_infinite_pool_factor_means_every_latent_because_command_lines_have_no_none():
    flags = [
        "--architecture",
        "sampled_topk",
        "--d_in",
        "8",
        "--d_sae",
        "16",
        "--k",
        "2",
        "--pool_factor",
        "inf",
        "--dataset_path",
        "x",
    ]
    for cfg in (_parse_cfg_args(flags).sae, config(pool_factor=float("inf"))):
        assert cfg.pool_factor is None
        assert cfg.n_candidates == cfg.d_sae


@pytest.mark.conformance(2)
def test_inference_config_is_jumprelu_and_remembers_where_it_came_from():
    inference = config(pool_factor=7.0, pool_seed=3).get_inference_sae_cfg_dict()
    assert inference["architecture"] == "jumprelu"
    assert not {"k", "pool_factor", "score", "pool_sampling", "pool_group_size", "pool_seed"} & set(inference)
    metadata = inference["metadata"]
    assert metadata["training_architecture"] == "sampled_topk"
    assert metadata["training_architecture_details"]["pool_factor"] == 7.0
    assert metadata["training_architecture_details"]["pool_seed"] == 3
    assert type(SAEConfig.from_dict(inference)) is JumpReLUSAEConfig


def test_nothing_the_user_gave_is_edited():
    given = {"k": 2.5, "pool_factor": 99.0, "pool_group_size": 3, "d_sae": 30}
    cfg = config(**given)
    assert {name: getattr(cfg, name) for name in given} == given


def test_a_whole_number_may_be_written_as_a_float():
    cfg = config(pool_group_size=16.0, pool_seed=3.0)
    assert (cfg.pool_group_size, cfg.pool_seed) == (16, 3)
    assert isinstance(cfg.pool_group_size, int)
