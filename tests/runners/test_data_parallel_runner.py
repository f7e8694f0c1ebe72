"""`DataParallelRunner` and `torchrun -m sae_lens_sampled train`: one SAELens run on several processes."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from datasets.distributed import split_dataset_by_node
from helpers import config, train_arguments
from process_helpers import FORKS
from runner_worker import BATCH, N_STEPS, NORMALISED, TIMEOUT, runner_config, sae, transcoder, transcoder_config, work
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from sae_lens_sampled import DataParallelRunner, SampledTopKTrainingSAE, SampledTopKTranscoder
from sae_lens_sampled.folders import find_checkpoint
from sae_lens_sampled.runners.data_parallel import (
    check_can_be_split,
    check_is_sampled,
    check_same_number,
    data_position_file,
    split_text,
)
from sae_lens_sampled.runners.processes import own_device
from sae_lens_sampled.runners.train_command import format_command
from sae_lens_sampled.runners.transcoder import read_both

TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]


def free_ports(n):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@pytest.fixture(scope="module")
def folder(tiny_lm, tmp_path_factory):
    """Folder in which two processes have run every case of the worker."""
    folder = tmp_path_factory.mktemp("runner")
    ports = free_ports(2)
    processes = [FORKS.Process(target=work, args=(rank, 2, ports, tiny_lm, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """Results of all cases, one entry per rank."""
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def checkpoints(folder):
    (run_folder,) = (folder / "checkpoints").iterdir()
    return sorted(run_folder.iterdir(), key=lambda path: (len(path.name), path.name))


def whole_text_on_one_process(cfg, given):
    """SAELens' own trainer on one process, with batches joined from two stores, each reading half of the text."""
    text = load_dataset(cfg.dataset_path, split="train", streaming=True)
    hooks = [cfg.hook_name, *([given.cfg.hook_name_out] if isinstance(given, SampledTopKTranscoder) else [])]
    model = load_model(cfg.model_class_name, cfg.model_name, device="cpu", hook_names=hooks)
    stores = [ActivationsStore.from_config(model, cfg, split_dataset_by_node(text, rank, 2)) for rank in range(2)]
    for store in stores:
        store.train_batch_size_tokens = BATCH // 2
        if len(hooks) == 2:
            read_both(store, hooks, cfg.sae.batch_parts)
    batches = (torch.cat(parts) for parts in zip(*stores, strict=True))
    trainer = SAETrainer(cfg.to_sae_trainer_config(), given, batches)
    trainer.fit()
    return trainer, stores


@pytest.mark.parametrize("case", [*NORMALISED, "transcoder"])
def test_two_processes_end_as_one_with_both_their_texts(ranks, tiny_lm, tmp_path, case):
    if case == "transcoder":
        cfg, given = transcoder_config(tiny_lm, tmp_path / "one"), transcoder(0)
    else:
        cfg, given = runner_config(tiny_lm, tmp_path / "one", case), sae(0, case)
    one, stores = whole_text_on_one_process(cfg, given)
    for rank, store in zip(ranks, stores, strict=True):
        run = rank[case]
        assert run["counters"] == [one.n_training_samples, one.n_training_steps, one.n_frac_active_samples]
        assert run["counters"][:2] == [BATCH * N_STEPS, N_STEPS]
        assert torch.equal(run["act_freq_scores"], one.act_freq_scores)
        assert torch.equal(run["since_fired"], one.n_forward_passes_since_fired)
        assert (run["lr"], run["l0"]) == (one.optimizer.param_groups[0]["lr"], one.sae.cfg.metadata.l0)
        assert run["place"] == store.n_dataset_processed
        for name, want in one.sae.state_dict().items():
            assert torch.equal(run["state"][name], ranks[0][case]["state"][name]), name
            close = {"rtol": 1e-4, "atol": 1e-5} if want.is_floating_point() else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(run["state"][name], want, msg=name, **close)
    assert (one.n_forward_passes_since_fired > 3).any()  # AuxK was active
    if case == "transcoder":
        return  # without normalisation nothing is estimated
    first, second = (rank[case]["estimates"] for rank in ranks)
    assert len(first) == len(second) == 1
    assert first[0][0] == second[0][0]
    if case == "covariance_whitening":
        assert torch.equal(first[0][1].matrix, second[0][1].matrix)


def test_the_first_process_alone_logs_evaluates_and_saves(ranks, folder):
    logged, of_other = (rank["resumed"]["logged"] for rank in ranks)
    assert {
        "model_performance_preservation",
        "losses/overall_loss",
        "metrics/pool_churn",
        "sparsity/below_1e-5",
    } <= set(logged)
    assert of_other == []
    assert ranks[0][NORMALISED[0]]["checkpoint_path"] == ranks[1][NORMALISED[0]]["checkpoint_path"]
    exported = SAE.load_from_disk(folder / NORMALISED[0] / "output")
    assert exported.cfg.architecture() == "jumprelu"
    sparsity = load_file(folder / NORMALISED[0] / "output" / "sparsity.safetensors")["sparsity"]
    n_samples = ranks[0][NORMALISED[0]]["counters"][2]
    torch.testing.assert_close(sparsity, (ranks[1][NORMALISED[0]]["act_freq_scores"] / n_samples + 1e-10).log10())


def test_a_resumed_run_has_every_process_at_its_own_place(ranks, folder):
    checkpoint, final = checkpoints(folder / NORMALISED[0])
    assert (checkpoint.name, final.name) == (str(BATCH * 9), f"final_{BATCH * N_STEPS}")
    places = [load_file(checkpoint / data_position_file(rank))["n_dataset_processed"].item() for rank in range(2)]
    assert places[0] != places[1]
    assert [rank["resumed"]["resumed_at"] for rank in ranks] == [
        [(data_position_file(rank), None, place)] * 2  # once by us before anything is read, once by SAELens
        for rank, place in enumerate(places)
    ]
    for rank in ranks:
        assert rank["resumed"]["counters"][0] == BATCH * N_STEPS
        assert rank["resumed"]["estimates"] == []  # the checkpoint's estimate is used: the weights were trained with it
        assert torch.equal(rank["resumed"]["state"]["W_dec"], ranks[0]["resumed"]["state"]["W_dec"])
    assert {path.name for path in checkpoints(folder / "resumed")[-1].iterdir()} == {
        path.name for path in final.iterdir()
    }


def test_a_signal_to_one_process_stops_all_after_the_same_step_with_a_whole_checkpoint(ranks):
    for rank in ranks:
        stopped = rank["stopped"]
        assert stopped["error"] == ("Interrupted", str(int(signal.SIGTERM)))
        assert (stopped["steps"], stopped["checkpoint"].name) == (5, str(5 * BATCH))
        assert find_checkpoint(stopped["checkpoint"]) == stopped["checkpoint"]
    assert (stopped["checkpoint"] / data_position_file(1)).exists()


def test_rows_that_are_not_finite_on_one_process_stop_all_with_the_same_words(ranks):
    errors = {rank["not finite"]["error"] for rank in ranks}
    assert len(errors) == 1
    (kind, text), steps = errors.pop(), {rank["not finite"]["steps"] for rank in ranks}
    assert (kind, steps) == ("ValueError", {2})
    assert text.startswith("64 of 128 rows of sae_in are not finite at training step 2;")


def test_different_configs_stop_all_at_the_start_with_the_same_words(ranks):
    assert ranks[0]["different"] == ranks[1]["different"]
    assert ranks[0]["different"] == [
        ("ValueError", "lr=0.002 on process 1, but 0.001 on process 0: start all with the same config."),
        ("ValueError", "sae.k=5 on process 1, but 4 on process 0: start all with the same config."),
        ("ValueError", "sae.d_sae=256 on process 1, but 192 on process 0: start all with the same config."),
        ("", ""),  # fields that may differ
    ]


def test_a_process_that_hangs_is_waited_for_until_the_time_out(ranks):
    hanging = ranks[0]["hanging"]
    kind, text = hanging["error"]
    assert (kind, hanging["steps"]) == ("LostRankError", 3)  # an earlier, shorter wait raised nothing
    assert "process 0 of 2 lost contact with the others: most likely one has ended or hangs" in text
    assert hanging["seconds"] > TIMEOUT.total_seconds()


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train_batch_size_tokens": 127},
            "train_batch_size_tokens=127 is not a multiple of 2, the number of processes",
        ),
        (
            {"train_batch_size_tokens": 100, "sae": config(pool_group_size=16)},
            "each rank has 50 tokens per batch, not a multiple of pool_group_size=16",
        ),
        ({"compile_sae": True}, "compile_sae=True works on one process"),
        ({"sae": BatchTopKTrainingSAEConfig(d_in=128, d_sae=192)}, "architecture='batchtopk' trains on one process"),
        ({"sae": config(dtype="float64")}, "dtype='float64' trains on one"),
        (
            {"device": "mps"},
            "'mps' cannot be used by several processes; set device, llm_device and act_store_device to 'cpu'",
        ),
        ({"device": "cuda:1"}, "'cuda:1' cannot be used by several processes; set device, llm_device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("two_processes")
def test_settings_that_cannot_be_shared_are_refused_before_anything_is_loaded(tiny_lm, tmp_path, fields, message):
    cfg = runner_config(tiny_lm, tmp_path, "none", **{"model_name": "not there", **fields})
    with pytest.raises(ValueError, match=re.escape(message)):
        DataParallelRunner(cfg)
    assert not torch.distributed.is_initialized()


def test_another_class_of_sae_than_the_configs_is_refused():
    check_is_sampled(SampledTopKTrainingSAE(config()), 2)
    with pytest.raises(ValueError, match=r"^a BatchTopKTrainingSAE trains on one process only, but there are 2; from_"):
        check_is_sampled(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=128, d_sae=192, k=8)), 2)


def test_every_process_of_a_machine_has_a_gpu_of_its_own(two_processes, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [own_device(name) for name in ("cuda", "cpu")] == ["cuda:1", "cpu"]
    monkeypatch.delenv("WORLD_SIZE")
    assert [own_device(name) for name in ("cuda", "cuda:1", "mps")] == ["cuda", "cuda:1", "mps"]
    check_can_be_split(runner_config(Path(), Path(), "none"), 2)


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1), (2, 3), (12, 2)])
def test_another_number_of_processes_cannot_resume(tmp_path, saved, now):
    for rank in range(saved):
        (tmp_path / data_position_file(rank)).touch()
    check_same_number(tmp_path, saved)
    with pytest.raises(ValueError, match=rf"for {saved} process(es)?, but {now} (is|are) running; start {saved}\.$"):
        check_same_number(tmp_path, now)


def test_the_text_is_split_and_nothing_of_it_is_lost(tiny_lm, tmp_path):
    cfg = runner_config(tiny_lm, tmp_path, "none")
    model = load_model(cfg.model_class_name, cfg.model_name, device="cpu", hook_names=[cfg.hook_name])
    rows = [{"text": f"row {i}"} for i in range(7)]
    stores = [ActivationsStore.from_config(model, cfg, Dataset.from_list(rows)) for _ in range(3)]
    for rank, store in enumerate(stores):
        split_text(store, rank, 3)
        assert store.train_batch_size_tokens == BATCH // 3
    assert sorted(chain(*(store._iterate_raw_dataset() for store in stores))) == [row["text"] for row in rows]
    with pytest.raises(ValueError, match="the text has 2 rows, fewer than the 3 processes"):
        split_text(ActivationsStore.from_config(model, cfg, Dataset.from_list(rows[:2])), 0, 3)
    stores[0].cached_activation_dataset = Dataset.from_list(rows[:1])
    stores[0].dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=r"^the activation cache has 1 rows, fewer than the 3 processes"):
        split_text(stores[0], 0, 3)


def test_alone_it_is_the_hosts_runner(tiny_lm, tmp_path):
    run = DataParallelRunner(runner_config(tiny_lm, tmp_path, "none"))
    trained = run.run()
    assert type(trained) is SampledTopKTrainingSAE
    assert type(run.activations_store) is ActivationsStore
    assert [path.name for path in checkpoints(tmp_path)] == [str(BATCH * 9), f"final_{BATCH * N_STEPS}"]
    assert not (checkpoints(tmp_path)[0] / data_position_file(1)).exists()


def test_the_command_that_resumes_starts_as_many_processes(two_processes, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    command = "torchrun --nproc-per-node 2 -m sae_lens_sampled train --k 8 --resume_from_checkpoint 64"
    assert format_command(["--k", "8"], Path("64")) == command
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert format_command(["--k", "8"], None).startswith("torchrun --nnodes 3 --nproc-per-node 2 -m sae_lens_sampled ")


def test_a_process_that_is_killed_ends_the_others_and_what_was_printed_resumes(tiny_lm, tmp_path):
    flags = {"training_tokens": 16_384, "n_checkpoints": 3, "save_final_checkpoint": True}
    arguments = train_arguments(tiny_lm, tmp_path, **flags)
    status, printed = _torchrun(tmp_path, ["-m", "sae_lens_sampled", "train", *arguments], kill_at="checkpoints/*/4*")
    assert status != 0
    assert "lost contact with the others: most likely one has ended or hangs" in printed
    assert not (tmp_path / "output").exists()
    (command,) = (shlex.split(line) for line in printed.splitlines() if line.startswith("torchrun"))
    assert command[:4] == ["torchrun", "--nproc-per-node", "2", "-m"]
    status, printed = _torchrun(tmp_path, command[3:])
    assert status == 0, printed
    (final,) = tmp_path.glob("checkpoints/*/final_*")
    assert torch.load(final / "trainer_state.pt")["n_training_samples"] == 16_384
    files = {"cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert {path.name for path in (tmp_path / "output").iterdir()} == files
    assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text())["train_batch_size_tokens"] == 128
    SAE.load_from_disk(tmp_path / "output")


def _torchrun(folder, arguments, kill_at=None):
    """Exit status and output of two processes; one is killed as soon as a file matches the pattern `kill_at`."""
    err = folder / "err"
    with err.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *arguments], stdout=file, stderr=file, env=environment
        )
        while kill_at is not None and process.poll() is None:
            if any(folder.glob(kill_at)):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait(timeout=120), err.read_text()
