"""Several processes as set by the environment: errors for wrong variables, and messages while waiting for others."""

import re
import threading
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import activations, sampled_sae, step_input, train_arguments
from runner_worker import runner_config
from test_data_parallel_runner import free_ports

from sae_lens_sampled import DataParallelRunner
from sae_lens_sampled.runners import processes
from sae_lens_sampled.runners.processes import join_processes, number_of_processes, own_device, rank_of_process
from sae_lens_sampled.runners.train_command import TrainError, train
from sae_lens_sampled.step.ranks import LostRankError


@pytest.fixture
def environment(monkeypatch):
    """Function that sets torchrun's variables; those not passed stay unset."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment must be a whole number of at least 1; torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number of at least 1; torchrun"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' in the environment must be a whole number of at least 1; torchrun"),
        ({"RANK": "first"}, "RANK='first' in the environment must be a whole number of at least 0; torchrun sets it."),
        ({"RANK": "1"}, "RANK=1 in the environment is not below WORLD_SIZE=1: ranks start at 0."),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 in the environment is not below WORLD_SIZE=2: ranks start at 0."),
        (
            {"WORLD_SIZE": "2", "RANK": " ", "MASTER_ADDR": "here"},
            "WORLD_SIZE=2 is set in the environment, but not RANK, MASTER_PORT: start with torchrun, which sets them, "
            "or unset WORLD_SIZE to train on one process.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "http"},
            "MASTER_PORT='http' in the environment must be a whole number",
        ),
    ],
    ids=str,
)
def test_a_wrong_variable_is_reported_by_train_in_a_sentence(tiny_lm, tmp_path, environment, variables, message):
    environment(**variables)
    with pytest.raises(TrainError, match=f"^{re.escape(message)}"):
        train(train_arguments(tiny_lm, tmp_path, model_name="not there"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("LOCAL_RANK", "-1"), ("RANK", "two")])
def test_a_wrong_variable_is_reported_by_the_runner_in_a_sentence(tiny_lm, tmp_path, environment, name, value):
    environment(**{"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", name: value})
    device = "cuda" if name == "LOCAL_RANK" else "cpu"
    with pytest.raises(ValueError, match=f"^{name}='{value}' in the environment must be a whole number of at least"):
        DataParallelRunner(runner_config(tiny_lm, tmp_path, "none", device=device, model_name="not there"))


def test_an_empty_variable_counts_as_not_set(environment):
    environment(WORLD_SIZE="", RANK="", LOCAL_RANK="")
    assert (number_of_processes(), rank_of_process(), own_device("cuda")) == (1, 0, "cuda")
    environment(WORLD_SIZE="2")
    assert own_device("cuda") == "cuda:0"


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize("field", ["device", "llm_device", "act_store_device"])
def test_a_gpu_that_is_not_there_is_reported_before_anything_is_loaded(tiny_lm, tmp_path, environment, count, field):
    environment(WORLD_SIZE=count, RANK="0", LOCAL_RANK="99", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    device = "cuda:99" if count == "1" else "cuda"
    others = {"llm_device": "cpu", "act_store_device": "cpu"} if field == "device" else {}
    cfg = runner_config(tiny_lm, tmp_path, "none", **{**others, field: device}, model_name="not there")
    with pytest.raises(ValueError, match=f"^torch cannot use {field}='cuda:99' on this machine; available: cpu"):
        DataParallelRunner(cfg)
    if field == "device":
        with pytest.raises(ValueError, match=r"^torch cannot use device='cuda:99' on this machine; available: cpu"):
            join_processes("cuda:99", timedelta(seconds=1))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_waits_for_others_says_so_until_it_gives_up(environment, monkeypatch, capsys, rank):
    (port,) = free_ports(1)
    monkeypatch.setattr(processes, "TELL_SECONDS", 0.2)
    environment(WORLD_SIZE="3", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where = f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}"
    with pytest.raises(
        LostRankError, match=rf"^process {rank} of 3 could not join the 2 other processes at {where}; start"
    ):
        join_processes("cpu", timedelta(seconds=1))
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith(f"process {rank} of 3 has waited ")]
    assert len(told) > 1
    assert told[0].endswith(
        f" s for the 2 other processes at {where}; each must be started with this address and its own RANK."
    )
    assert "waiting for other processes" not in {thread.name for thread in threading.enumerate()}


def test_an_sae_that_trains_alone_beside_others_warns_once(environment):
    environment(WORLD_SIZE="2")
    for step in ("kept", "dense"):
        sae = sampled_sae(step=step)
        message = r"^WORLD_SIZE=2, but each process .* use `torchrun -m sae_lens_sampled train` or DataParallelRunner"
        with pytest.warns(UserWarning, match=message) as warned:
            sae.training_forward_pass(step_input(activations(32)))
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sae.training_forward_pass(step_input(activations(32)))


@pytest.mark.parametrize("count", [None, "", "1", "two"])
def test_an_sae_that_is_alone_does_not_warn(environment, count):
    environment(**({} if count is None else {"WORLD_SIZE": count}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = sampled_sae().training_forward_pass(step_input(activations(32)))
    assert output.loss.isfinite()
