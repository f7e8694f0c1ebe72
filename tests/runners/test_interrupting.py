"""`sae-lens-sampled train` under SIGINT and SIGTERM, which save a checkpoint, and SIGKILL; how runs are resumed."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import train_arguments
from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE

from sae_lens_sampled import SampledTopKTrainingSAE
from sae_lens_sampled.files import atomic_path
from sae_lens_sampled.folders import find_checkpoint
from sae_lens_sampled.runners.train_command import TrainError, format_command, train
from sae_lens_sampled.signals import Interrupted, Signals

N_KILLS = int(os.environ.get("TRAIN_KILLS", "1"))
"""`TRAIN_KILLS=10 pytest tests/runners/test_interrupting.py -k random` takes a few minutes."""

N_TOKENS, BATCH = 1024, 128
PROGRAM = [sys.executable, "-W", "ignore", "-m", "sae_lens_sampled"]


def run_in_process(arguments, capfd):
    """Exit status and printed commands."""
    status = train(arguments)
    return status, printed_commands(capfd.readouterr().err)


def printed_commands(text):
    """The flags after `train` of all printed commands."""
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("sae-lens-sampled train")]


def trainer_state(checkpoint):
    return torch.load(Path(checkpoint) / "trainer_state.pt")


def tokens_seen(folder):
    """Numbers of training samples in the final checkpoints of all runs in `folder`."""
    finals = folder.glob("checkpoints/*/final_*")
    return {trainer_state(checkpoint)["n_training_samples"] for checkpoint in finals}


def send_at(monkeypatch, owner, name, call, number=signal.SIGTERM):
    """Signal this process in the given call of `owner.name`: once before and once after the call does its work."""
    original, calls = getattr(owner, name), iter(range(1000))

    def sends(*args, **kwargs):
        now = next(calls) == call
        if now:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if now:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, sends)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """More threads only slow down work this small, tenfold if other processes compete for the cores."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def arguments(tiny_lm, tmp_path):
    return train_arguments(tiny_lm, tmp_path, n_checkpoints=2, save_final_checkpoint=True)


@pytest.fixture(scope="module")
def whole_run(tiny_lm, tmp_path_factory):
    """Folder with the checkpoints of a run: at 384 and 768 tokens, and at the end."""
    folder = tmp_path_factory.mktemp("whole_run")
    assert train(train_arguments(tiny_lm, folder, n_checkpoints=2, save_final_checkpoint=True)) == 0
    (run,) = (folder / "checkpoints").iterdir()
    assert {checkpoint.name for checkpoint in run.iterdir()} == {"384", "768", "final_1024"}
    return run


@pytest.fixture
def run_folder(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "checkpoints" / "run")


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "trained"),
    [
        (signal.SIGTERM, SampledTopKTrainingSAE, "training_forward_pass", 0, BATCH),
        (signal.SIGINT, SampledTopKTrainingSAE, "training_forward_pass", 4, 5 * BATCH),
        (signal.SIGTERM, torch.optim.Adam, "step", 4, 5 * BATCH),
        (signal.SIGINT, ActivationsStore, "__next__", 4, 4 * BATCH),
        (signal.SIGTERM, ActivationsStore, "save_to_checkpoint", 0, 3 * BATCH),
    ],
    ids=["first step", "forward pass", "optimizer", "waiting for data", "writing a checkpoint"],
)
def test_a_signal_ends_with_a_whole_checkpoint_between_two_steps_and_the_command_that_resumes(
    number, owner, name, call, trained, arguments, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as patched:
        send_at(patched, owner, name, call, number)
        status, (_, command) = run_in_process(arguments, capfd)
    assert status == 128 + number
    assert not list(tmp_path.glob("checkpoints/*/unfinished_*"))
    checkpoint = Path(command[-1])
    assert find_checkpoint(checkpoint) == checkpoint
    state = trainer_state(checkpoint)
    assert (state["n_training_samples"], state["n_training_steps"]) == (trained, trained // BATCH)
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {trained // BATCH}
    assert TrainingSAE.load_from_disk(checkpoint).pool_record.n_steps == trained // BATCH
    assert run_in_process(command, capfd)[0] == 0
    assert tokens_seen(tmp_path) == {N_TOKENS}
    assert (tmp_path / "output" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(ActivationsStore, "__next__"), (LanguageModelSAETrainingRunner, "_set_sae_metadata")]
)
def test_a_signal_before_the_first_step_saves_nothing_and_prints_the_same_command(
    owner, name, arguments, tmp_path, monkeypatch, capfd
):
    send_at(monkeypatch, owner, name, 0)
    status, commands = run_in_process(arguments, capfd)
    assert status == 128 + signal.SIGTERM
    assert commands[-1] == arguments
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_a_signal_after_the_last_step_lets_the_run_end(arguments, tmp_path, monkeypatch, capfd):
    send_at(monkeypatch, LanguageModelSAETrainingRunner, "save_final_sae", 0)
    assert run_in_process(arguments, capfd)[0] == 0
    assert tokens_seen(tmp_path) == {N_TOKENS}
    SAE.load_from_disk(tmp_path / "output")


def test_what_the_first_signal_began_is_not_disturbed_by_the_next_and_handlers_end_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals():
        with pytest.raises(Interrupted) as interrupted:
            signal.raise_signal(signal.SIGTERM)
        assert (interrupted.value.exit_status, interrupted.value.signal_name) == (143, "SIGTERM")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_folder_is_replaced_by_a_whole_one_or_stays(tmp_path):
    for text in ("old", "new"):
        with atomic_path(tmp_path / "folder", replace=True) as folder:
            folder.mkdir()
            (folder / text).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "folder", replace=True) as folder:
        shutil.copytree(tmp_path / "folder", folder, copy_function=lambda source, target: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


def test_a_run_that_was_stopped_right_after_its_sparsity_was_logged_resumes(arguments, monkeypatch, capfd):
    """The sampling window is then empty; SAELens would log 0 / 0, which wandb rejects."""
    with monkeypatch.context() as patched:
        send_at(patched, ActivationsStore, "__next__", 4)
        _, (_, command) = run_in_process([*arguments, "--feature_sampling_window", "4"], capfd)
    assert trainer_state(command[-1])["n_frac_active_samples"] == 0
    assert run_in_process(command, capfd)[0] == 0


def test_a_resumed_run_has_its_checkpoint_in_its_folder_and_writes_none_again(run_folder, arguments, tmp_path, capfd):
    status, (command,) = run_in_process([*arguments, "--resume_from_checkpoint", str(run_folder / "768")], capfd)
    assert status == 0
    new = Path(command[-1])
    assert new.parent == run_folder.parent
    assert new != run_folder
    assert {checkpoint.name for checkpoint in new.iterdir()} == {"768", "final_1024"}
    assert (new / "768" / "cfg.json").samefile(run_folder / "768" / "cfg.json")  # a link


def test_a_checkpoint_of_other_parameters_is_refused_in_a_sentence(run_folder, arguments):
    flags = ["--d_sae", "256", "--model_name", "not there", "--resume_from_checkpoint", str(run_folder)]
    with pytest.raises(TrainError, match=r"^d_sae=256, but '.*final_1024' was trained with d_sae=192: "):
        train([*arguments, *flags])


def test_the_folder_of_a_run_stands_for_its_newest_whole_checkpoint(run_folder):
    os.utime(run_folder / "384" / "runner_cfg.json")  # as after resuming on a host with another clock
    assert find_checkpoint(run_folder) == run_folder / "final_1024"
    (run_folder / "final_1024" / "runner_cfg.json").unlink()
    assert find_checkpoint(run_folder) == run_folder / "768"


@pytest.mark.parametrize("damage", ["is missing", "is cut short"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_the_newest_that_is_named(damage, run_folder):
    needed = [path.name for path in (run_folder / "384").iterdir() if path.name != "sparsity.safetensors"]
    assert len(needed) == 6
    for name in needed:
        broken = run_folder / "broken"
        shutil.copytree(run_folder / "384", broken)
        whole = (broken / name).read_bytes()
        (broken / name).unlink()
        if damage == "is cut short":
            (broken / name).write_bytes(whole[:-1])
        with pytest.raises(
            ValueError, match=f"no readable {name}; the newest complete checkpoint beside it .*final_1024"
        ):
            find_checkpoint(broken)
        shutil.rmtree(broken)


def test_where_there_is_no_whole_checkpoint_the_way_out_is_to_start_anew(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"run' holds no complete checkpoint.* Leave resume_from_checkpoint out"):
        find_checkpoint(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_no_half(run_folder, arguments, monkeypatch):
    def disk_is_full(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(ActivationsStore, "save_to_checkpoint", disk_is_full)
    with pytest.raises(TrainError, match=r"there is more to write, but .* MB left"):
        train([*arguments, "--resume_from_checkpoint", str(run_folder / "384")])
    (new,) = set(run_folder.parent.iterdir()) - {run_folder}
    assert [checkpoint.name for checkpoint in new.iterdir()] == ["384"]


def test_the_end_of_a_normalised_run_is_not_normalised_again(arguments, tmp_path, capfd):
    arguments += ["--normalize_activations", "expected_average_only_in", "--n_batches_for_norm_estimate", "2"]
    _, (command,) = run_in_process(arguments, capfd)
    ended = SAE.load_from_disk(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    assert train(command) == 0
    again = SAE.load_from_disk(tmp_path / "output")
    for name, tensor in ended.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.cfg.normalize_activations == ended.cfg.normalize_activations == "none"
    with pytest.raises(TrainError, match="is the final checkpoint of a run, with normalize_activations"):
        train([*command, "--training_tokens", "2048"])


def test_the_command_that_resumes_replaces_an_earlier_checkpoint_and_quotes():
    flags = ["--k", "8", "--resume_from_checkpoint", "old", "--output_path", "my output", "--resume_from_checkpoint=x"]
    assert format_command(flags, Path("a b/64")) == (
        "sae-lens-sampled train --k 8 --output_path 'my output' --resume_from_checkpoint 'a b/64'"
    )
    assert format_command(["--k", "8"], None) == "sae-lens-sampled train --k 8"


def test_a_run_that_is_stopped_at_a_random_moment_resumes_and_ends_with_the_same_number_of_tokens(tiny_lm, tmp_path):
    moments = random.Random(0)
    kills = [
        (number, i % 5 == 4, moments.random(), tmp_path / f"{number.name}_{i}")  # every fifth before training begins
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        for i in range(N_KILLS)
    ]
    with ThreadPoolExecutor(2) as beside:
        stopped = list(beside.map(lambda kill: _stopped_run(tiny_lm, *kill), kills))
    for (number, early, moment, folder), (status, arguments, printed) in zip(kills, stopped, strict=True):
        assert status in (0, 128 + number, -number)  # ended, stopped, or killed: by SIGKILL, or while importing
        assert early or number == signal.SIGKILL or status >= 0
        how = _end_it(status, arguments, printed)
        seen = tokens_seen(folder)
        when = "of start" if early else "of training"
        print(f"{number.name} at {moment:.2f} {when}: status {status}, {how}; {seen} tokens seen")  # noqa: T201  for -rP
        assert seen == {20_096}  # 157 steps of 128
        SAE.load_from_disk(folder / "output")


def _stopped_run(model, number, early, moment, folder):
    """Exit status of a process that got a signal, its flags, and the commands it printed."""
    folder.mkdir()
    arguments = train_arguments(model, folder, training_tokens=20_000, n_checkpoints=4, save_final_checkpoint=True)
    err = folder / "err"
    with err.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*PROGRAM, "train", *arguments], stderr=file, env=environment)
        while not early and process.poll() is None and not printed_commands(err.read_text()):
            time.sleep(0.01)
        time.sleep(moment * (5 if early else 1))  # roughly the seconds until training begins, and those of training
        process.send_signal(number)
        status = process.wait()
    return status, arguments, printed_commands(err.read_text())


def _end_it(status, arguments, printed):
    """Run the command that was printed last, and return a description of how the run ended."""
    if status == 0:
        return "had ended"
    if not printed:
        assert train(arguments) == 0
        return "started again"
    try:
        assert train(printed[-1]) == 0
    except TrainError as error:
        if "Leave resume_from_checkpoint out to start anew." not in str(error):  # killed before it had a checkpoint
            raise
        assert train(arguments) == 0
        return "refused to resume, started anew"
    return (
        f"resumed from {Path(printed[-1][-1]).name}" if "--resume_from_checkpoint" in printed[-1] else "started again"
    )
