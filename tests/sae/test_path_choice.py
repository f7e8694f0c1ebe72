"""Where only measuring can tell, the fastest path is taken; timers (except in one test) and failures are stubs."""

import pytest
import torch
from helpers import activations, sampled_sae, step_input
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_sampled.sae import path_choice, training
from sae_lens_sampled.sae.path_choice import AGAIN_AFTER_STEPS, VARIABLE, PathChoice, fastest_path
from sae_lens_sampled.step.ranks import ALONE, Ranks

CPU = torch.device("cpu")
WEIGHT = torch.nn.Parameter(torch.ones(()))


class Clock:
    """A clock that advances only when a path is run."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(path_choice, "now", lambda device: self.seconds)

    def way(self, *seconds, loss=1.0, error=None):
        """A path whose calls take these times in turn; the last time repeats."""
        left = list(seconds)

        def loss_of():
            self.seconds += left.pop(0) if len(left) > 1 else left[0]
            if error is not None:
                raise error
            return WEIGHT * loss

        return loss_of


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def measured_here(monkeypatch):
    """Compare paths as on a GPU; a list with the losses of every comparison."""
    calls = []

    def stub(loss_by, paths, parameters, ranks):
        calls.append({path: loss_by(path).item() for path in paths})
        return "kept"

    monkeypatch.setattr(training, "MEASURED_DEVICES", ("cpu",))
    monkeypatch.setattr(training, "fastest_path", stub)
    return calls


def chosen(ways, ranks=ALONE):
    return fastest_path(lambda path: ways[path](), list(ways), [WEIGHT], ranks)


def test_the_median_of_passes_after_the_first_decides_and_one_line_says_it(clock, caplog):
    ways = {"kept": clock.way(9.0, 0.002, 5.0, 0.001), "dense": clock.way(0.0, 0.003, 0.003, 0.003)}
    with caplog.at_level("INFO", logger="sae_lens"):
        assert chosen(ways) == "kept"
    [line] = [record.message for record in caplog.records]
    assert line == (
        "sampled_topk: forward and backward take 2.00 ms by 'kept', 3.00 ms by 'dense'; steps take the path 'kept' "
        "until paths are timed again"
    )
    assert chosen({"kept": clock.way(0.0, 0.004), "dense": clock.way(9.0, 0.003)}) == "dense"


@pytest.mark.parametrize("failing", ["kept", "dense"])
@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), torch.OutOfMemoryError("out of memory")], ids=str)
def test_a_way_that_fails_is_left_with_its_reason(clock, failing, error):
    other = {"kept": "dense", "dense": "kept"}[failing]
    ways = {failing: clock.way(0.001, error=error), other: clock.way(5.0)}
    with pytest.warns(UserWarning, match=rf"timing rejects the path '{failing}': {type(error).__name__}: {error}"):
        assert chosen(ways) == other


@pytest.mark.parametrize("loss", [1.001, float("nan")])
def test_a_way_with_another_loss_is_left(clock, loss):
    ways = {"kept": clock.way(0.001, loss=loss), "dense": clock.way(5.0)}
    with pytest.warns(UserWarning, match=r"timing rejects the path 'kept': its loss is (1\.001|nan).*dense step 1"):
        assert chosen(ways) == "dense"


def test_under_autocast_losses_may_lie_further_apart(clock):
    ways = {"kept": clock.way(0.001, loss=1.001), "dense": clock.way(5.0)}
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(ways) == "kept"


def test_where_every_way_fails_the_step_is_dense_and_says_why_itself(clock):
    ways = {path: clock.way(1.0, error=RuntimeError("broken")) for path in ("kept", "dense")}
    with pytest.warns(UserWarning, match="broken"):
        assert chosen(ways) == "dense"


def test_the_slowest_process_decides_for_all(clock):
    class Two(Ranks):
        def max(self, x):
            return torch.maximum(x, torch.tensor([4.0, 3.0], dtype=torch.float64))

    assert chosen({"kept": clock.way(1.0), "dense": clock.way(2.0)}, Two()) == "dense"


def test_it_is_measured_again_at_another_size_after_a_hundred_steps_and_with_many_dead():
    choice = PathChoice(CPU)
    due = []
    for at in (
        (64, 0, 0.0),
        (64, 1, 0.0),
        (32, 2, 0.0),
        (32, AGAIN_AFTER_STEPS - 1, 0.1),
        (32, AGAIN_AFTER_STEPS, 0.1),
        (32, AGAIN_AFTER_STEPS + 1, 0.11),
        (32, 999, 0.5),
    ):
        due.append(choice.is_due(*at))
        if due[-1]:
            choice.remember("kept", *at)
    assert due == [True, False, True, False, True, True, False]


def test_a_measured_run_is_that_of_the_path_it_takes(measured_here):
    measured, fixed = sampled_sae(pool_group_size=16), sampled_sae(pool_group_size=16, step="kept")
    for number in range(3):
        given = step_input(activations(48, seed=number), n_dead=4, step=number)
        outputs = [sae.training_forward_pass(given) for sae in (measured, fixed)]
        assert outputs[0].path == "kept"
        assert torch.equal(outputs[0].loss, outputs[1].loss)
    [losses] = measured_here
    assert losses["kept"] == pytest.approx(losses["dense"], rel=1e-5)
    for name, buffer in fixed.named_buffers():
        assert name == "path_choice.record" or torch.equal(buffer, measured.get_buffer(name)), name
    assert measured.scan_record == fixed.scan_record


def test_a_resumed_run_takes_the_path_that_was_measured(measured_here, tmp_path):
    sae, given = sampled_sae(pool_group_size=16), step_input(activations(48))
    sae.training_forward_pass(given)
    sae.save_model(tmp_path)
    resumed = TrainingSAE.load_from_disk(tmp_path)
    assert resumed.training_forward_pass(given).path == "kept"
    assert len(measured_here) == 1
    SAE.load_from_disk(tmp_path)  # the inference architecture has no such record


def test_it_is_measured_anew_when_pools_end_and_once_in_a_resumed_run_too(measured_here, tmp_path):
    sae, given = sampled_sae(pool_group_size=16, pool_steps=2), step_input(activations(48))
    n_measured = []
    for number in range(4):
        if number == 2:
            sae.save_model(tmp_path)
        sae.training_forward_pass(given)
        n_measured.append(len(measured_here))
    assert n_measured == [1, 1, 2, 2]
    resumed = TrainingSAE.load_from_disk(tmp_path)
    for _ in range(2):
        assert resumed.training_forward_pass(given).pool is None
    assert len(measured_here) == 3


def test_a_path_that_is_no_longer_available_is_timed_again(measured_here, monkeypatch):
    """A run with one small pool is resumed with a value of `pool_steps` that it has already passed."""
    monkeypatch.setattr(training, "fastest_path", lambda loss_by, paths, *_: measured_here.append(paths) or paths[0])
    sae, resumed = sampled_sae(pool_factor=1), sampled_sae(pool_factor=1, pool_steps=1)
    for _ in range(2):
        assert sae.training_forward_pass(step_input(activations(48))).path == "columns"
    resumed.load_state_dict(sae.state_dict())
    assert resumed.training_forward_pass(step_input(activations(48))).path == "kept"
    assert measured_here == [["columns", "dense"], ["kept", "dense"]]


@pytest.mark.parametrize("step", ["kept", "dense"])
def test_a_given_step_is_not_timed(measured_here, monkeypatch, step):
    assert sampled_sae(step=step).training_forward_pass(step_input(activations(48))).path == step
    monkeypatch.setenv(VARIABLE, step)
    assert sampled_sae().training_forward_pass(step_input(activations(48))).path == step
    assert measured_here == []


def test_an_unknown_step_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"^SAE_LENS_SAMPLED_STEP='fast' must be one of auto, kept, dense\.$"):
        sampled_sae().training_forward_pass(step_input(activations(48)))


def test_hooks_and_methods_of_ones_own_are_not_measured(measured_here):
    sae = sampled_sae()
    sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: tensor)
    assert sae.training_forward_pass(step_input(activations(48))).path == "dense"
    assert measured_here == []


def test_without_gradient_nothing_is_timed(measured_here):
    sae = sampled_sae()
    with torch.no_grad():
        sae.training_forward_pass(step_input(activations(48)))
    assert measured_here == []
    sae.training_forward_pass(step_input(activations(48)))
    assert len(measured_here) == 1


def test_a_frozen_parameter_does_not_keep_paths_from_being_timed(monkeypatch, recwarn):
    monkeypatch.setattr(training, "MEASURED_DEVICES", ("cpu",))
    sae = sampled_sae()
    sae.b_dec.requires_grad_(False)
    sae.training_forward_pass(step_input(activations(48)))
    assert not [warning for warning in recwarn if "path" in str(warning.message)]


def test_real_timers_end_in_one_of_the_ways(monkeypatch):
    monkeypatch.setattr(training, "MEASURED_DEVICES", ("cpu",))
    sae = sampled_sae(pool_group_size=16)
    sae.training_forward_pass(step_input(activations(48)))
    assert sae.path_choice.path in ("kept", "dense")
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.usefixtures("unchecked_types")
def test_a_compiled_step_is_measured_once_outside_of_the_graph(measured_here):
    sae = sampled_sae(pool_factor=None)
    step = torch.compile(sae.training_forward_pass, backend="eager")  # as the runner's `compile_sae` does
    outputs = [step(step_input(activations(64))) for _ in range(3)]
    assert [output.path for output in outputs] == ["kept"] * 3
    assert len(measured_here) == 1
    outputs[-1].loss.backward()
    assert sae.W_enc.grad is not None
