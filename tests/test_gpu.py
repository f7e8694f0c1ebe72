"""On a GPU, steps, runs, exports and evals do what they do on the CPU. Skipped without a GPU."""

import copy
from pathlib import Path

import pytest
import torch
from eval_helpers import GIVEN, SMALL
from helpers import D_SAE, activations, batchtopk_sae, gradients, sampled_sae, step_input
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens.model_bridge import TransformerBridge

import sae_lens_sampled.step.auxiliary
import sae_lens_sampled.step.triton
from sae_lens_sampled import (
    SampledTopKTrainingSAE,
    SampledTopKTrainingSAEConfig,
    calibrate_thresholds,
    load_checkpoint,
)
from sae_lens_sampled.step.triton import available

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

POOLS = [
    {},
    {"pool_factor": D_SAE / 3},
    {"pool_group_size": 8},
    {"pool_group_size": 8, "matryoshka_widths": [10, D_SAE]},
    {"pool_sampling": "proportional", "score": "squared_l2"},
    {"pool_group_size": 8, "score": "perplexity"},
    {"score": "ridge_leverage"},
    {"score": "entropy", "rescale_acts_by_decoder_norm": True},
]


def on(device, sae):
    moved = copy.deepcopy(sae).to(device)
    moved.cfg.device = device
    return moved


def step_on(device, sae, x, n_dead, number=0):
    given = step_input(x.to(device), n_dead=n_dead, step=number)
    given.dead_neuron_mask = given.dead_neuron_mask.to(device)
    return sae.training_forward_pass(given)


@pytest.fixture(params=[True, False], ids=["kernels", "torch alone"])
def with_kernels(request, monkeypatch):
    """With kernels, and without them, as if triton were missing."""
    if not request.param:
        monkeypatch.setattr(sae_lens_sampled.step.triton, "_imports", lambda: False)
    elif not available(torch.device(DEVICE)):
        pytest.skip("no kernels for this GPU")
    monkeypatch.setattr(sae_lens_sampled.step.auxiliary, "MIN_DEAD_ON_GPU", 1)
    return request.param


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("n_dead", [0, 9])
@pytest.mark.parametrize("path", ["kept", "dense"])
@pytest.mark.parametrize("fields", POOLS, ids=str)
def test_steps_are_those_of_the_cpu(fields, path, n_dead):
    on_cpu, on_gpu = (on(device, sampled_sae(step=path, **fields)) for device in ("cpu", DEVICE))
    for number in range(3):
        x = activations(64, seed=number)
        want = step_on("cpu", on_cpu, x, n_dead, number)
        got = step_on(DEVICE, on_gpu, x, n_dead, number)
        assert got.feature_acts.device.type == DEVICE
        torch.testing.assert_close(dense(got.feature_acts).cpu(), dense(want.feature_acts), rtol=1e-4, atol=1e-4)
        for name, loss in want.losses.items():
            torch.testing.assert_close(got.losses[name].cpu(), loss, rtol=1e-4, atol=1e-4)
        want_gradients = gradients(on_cpu, want)
        for name, gradient in gradients(on_gpu, got).items():
            torch.testing.assert_close(gradient.cpu(), want_gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    for name, buffer in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), buffer, rtol=1e-4, atol=1e-4, msg=name)


def dense(acts):
    return acts.to_dense() if acts.is_sparse else acts


KERNEL_STEPS = [
    {"pool_group_size": 16},
    {"pool_group_size": 16, "score": "perplexity", "matryoshka_widths": [100, 1000, 4096]},
    {"pool_factor": None},
]


def large_sae(**fields):
    """SAE of a size at which a kernel's programs run in parallel and a latent may fire on every token."""
    torch.manual_seed(0)
    given = {"d_in": 100, "d_sae": 4096, "k": 16, "step": "kept", "device": DEVICE, **fields}
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(**given))
    sae.b_enc.data[:3] = 50.0
    return sae


def large_step(sae, number, n_dead=400):
    """A step of some 5,000 tokens, not a multiple of any block size."""
    x = torch.randn(5003, 100, generator=torch.Generator().manual_seed(number)).to(DEVICE)
    given = step_input(x, step=number)
    given.dead_neuron_mask = torch.arange(4096, device=DEVICE) < n_dead
    return sae.training_forward_pass(given)


@pytest.mark.parametrize("fields", KERNEL_STEPS, ids=str)
def test_steps_by_kernels_repeat_to_the_last_bit_and_are_those_of_torch(fields, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.auxiliary, "MIN_DEAD_ON_GPU", 1)
    if not available(torch.device(DEVICE)):
        pytest.skip("no kernels for this GPU")
    results = []
    for on in (True, True, False):
        with monkeypatch.context() as patch:
            if not on:
                patch.setattr(sae_lens_sampled.step.triton, "_imports", lambda: False)
            sae = large_sae(**fields)
            large_step(sae, 0)
            output = large_step(sae, 1)
            assert output.path == "kept"
            results.append((output, gradients(sae, output)))
    (first, of_first), (second, of_second), (other, of_other) = results
    assert torch.equal(first.feature_acts.coalesce().indices(), second.feature_acts.coalesce().indices())
    assert torch.equal(first.loss, second.loss)
    torch.testing.assert_close(first.loss, other.loss, rtol=1e-4, atol=0)
    for name, gradient in of_first.items():
        assert torch.equal(gradient, of_second[name]), name
        difference = (gradient - of_other[name]).norm()
        assert difference < 1e-3 * of_other[name].norm(), name


@pytest.mark.parametrize("fields", KERNEL_STEPS, ids=str)
def test_a_step_by_kernels_waits_for_the_device_twice(fields, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.auxiliary, "MIN_DEAD_ON_GPU", 1)
    if not available(torch.device(DEVICE)):
        pytest.skip("no kernels for this GPU")
    sae = large_sae(**fields)
    for number in range(2):  # compiles the kernels and finds the cutoff
        large_step(sae, number).loss.backward()
    tolist, n_reads = torch.Tensor.tolist, 0

    def allowed(x):
        nonlocal n_reads
        n_reads += x.is_cuda
        torch.cuda.set_sync_debug_mode("default")
        numbers = tolist(x)
        torch.cuda.set_sync_debug_mode("error")
        return numbers

    x = torch.randn(5003, 100, device=DEVICE)
    given = step_input(x, step=2)
    given.dead_neuron_mask = torch.arange(4096, device=DEVICE) < 400
    monkeypatch.setattr(torch.Tensor, "tolist", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sae.training_forward_pass(given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert n_reads == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_their_definitions(dtype):
    """At sizes for which the interpreter is too slow."""
    if not available(torch.device(DEVICE)):
        pytest.skip("no kernels for this GPU")
    from sae_lens_sampled.step.triton.dots import dots, plain_dots
    from sae_lens_sampled.step.triton.row_sums import plain_row_sums, row_sums
    from sae_lens_sampled.step.triton.scan import (
        Above,
        Buffers,
        Chunk,
        TileSums,
        extract,
        plain_extract,
        plain_sums,
        sum_tiles,
    )
    from sae_lens_sampled.step.triton.tiles import Tiles

    device = torch.device(DEVICE)
    lengths = torch.tensor([3000, 0, 1, 257, 256, 5000, 64] * 20, device=device)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = torch.randint(0, 1000, (int(starts[-1]),), device=device)
    matrix, values = torch.randn(1000, 777, device=device).to(dtype), torch.randn(len(rows), device=device)
    got, want = (function(values, rows, starts, matrix) for function in (row_sums, plain_row_sums))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
    others = torch.randint(0, 900, (len(rows),), device=device)
    other = torch.randn(900, 777, device=device)
    got, want = (function(rows, others, matrix, other) for function in (dots, plain_dots))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
    for n_tokens, group_size in ((1000, 16), (1000, 1000), (77, 3), (1, 1)):
        tiles, n_latents = Tiles(n_tokens, group_size), 1003
        products = torch.randn(n_tokens, n_latents, device=device).to(dtype)
        products[n_tokens // 2, 7] = torch.nan
        b_enc, norms, threshold = (torch.rand(n_latents, device=device) for _ in range(3))
        chunk = Chunk(products, 64, b_enc, norms, threshold)
        above = Above(torch.tensor(0.5, device=device), torch.rand(tiles.n_groups, n_latents, device=device) < 0.5)
        sums = TileSums.empty(tiles, n_latents, "shares", device)
        counts = sum_tiles(chunk, tiles, sums, above)
        want = plain_sums(chunk, tiles, "shares")
        assert torch.equal(sums.n_fired, want.n_fired)
        torch.testing.assert_close(sums.peak, want.peak, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(sums.sums, want.sums, rtol=1e-4, atol=1e-5, equal_nan=True)
        entries = plain_extract(chunk, tiles, above)
        buffers = Buffers.empty(len(entries.values) + 5, device)
        n_found = extract(chunk, tiles, above, counts, torch.zeros((), dtype=torch.int64, device=device), buffers)
        assert n_found == len(entries.values)
        for mine, theirs in zip(buffers, entries, strict=True):
            torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=0, atol=0, equal_nan=True)


def test_a_pool_of_all_latents_is_batchtopk_to_the_last_bit():
    ours = on(DEVICE, sampled_sae(pool_factor=D_SAE / 3, step="dense"))
    theirs = on(DEVICE, batchtopk_sae())
    for number in range(5):
        mine, want = (step_on(DEVICE, sae, activations(64, seed=number), 5) for sae in (ours, theirs))
        assert torch.equal(mine.feature_acts, want.feature_acts)
        assert torch.equal(mine.loss, want.loss)
        want_gradients = gradients(theirs, want)
        assert all(torch.equal(gradient, want_gradients[n]) for n, gradient in gradients(ours, mine).items())


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 8}, {"pool_factor": D_SAE / 3}], ids=str)
@pytest.mark.parametrize("path", ["auto", "kept", "dense"])
def test_autocast_trains(fields, path):
    sae = on(DEVICE, sampled_sae(step=path, **fields))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses = []
    for number in range(30):
        with torch.autocast(DEVICE, torch.bfloat16):
            output = step_on(DEVICE, sae, activations(64, seed=100 + number), 3, number)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    assert sae.topk_threshold.dtype == torch.float64


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}], ids=str)
def test_a_run_its_checkpoint_and_its_export_go_between_devices(fields, tiny_lm, tmp_path):
    model = TransformerBridge.boot_transformers(str(tiny_lm), device=DEVICE)
    shared = {"d_in": 128, "d_sae": 192, "k": 8, "pool_factor": 4, "device": DEVICE}
    config = LanguageModelSAERunnerConfig(
        sae=SampledTopKTrainingSAEConfig(**shared, **fields),
        model_name=str(tiny_lm),
        hook_name="blocks.2.hook_resid_post",
        dataset_path=str(tiny_lm / "text"),
        context_size=32,
        training_tokens=512 * 20,
        train_batch_size_tokens=512,
        store_batch_size_prompts=8,
        n_batches_in_buffer=32,
        device=DEVICE,
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
        output_path=str(tmp_path / "output"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = LanguageModelSAETrainingRunner(config, override_model=model)
    trained = runner.run()
    x = runner.activations_store.get_filtered_llm_batch()[:512].float()
    [checkpoint] = Path(runner.cfg.checkpoint_path).glob("final_*")
    on_cpu = load_checkpoint(checkpoint, device="cpu")
    torch.testing.assert_close(on_cpu.select(x.cpu(), draw=0), trained.select(x, draw=0).cpu(), rtol=1e-3, atol=1e-3)
    exported = {device: SAE.load_from_disk(tmp_path / "output", device=device) for device in ("cpu", DEVICE)}
    torch.testing.assert_close(exported["cpu"](x.cpu()), exported[DEVICE](x).cpu(), rtol=1e-3, atol=1e-3)
    calibrated, _ = calibrate_thresholds(trained, [x], "per_latent", show_progress=False)
    assert calibrated.encode(x).count_nonzero().item() / len(x) == pytest.approx(8, rel=0.05)


def test_the_evals_run(tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from sae_lens_sampled.saebench import run_evals

    saes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = SampledTopKTrainingSAEConfig(d_in=128, d_sae=160, k=8, pool_factor=5, device=DEVICE)
        config.metadata.hook_name, config.metadata.context_size = "blocks.2.hook_resid_post", 48
        saes.append((f"sampled_seed{seed}", trained_a_little(config)))
    results = run_evals(saes, list(SMALL), output_dir=tmp_path, overrides=SMALL, device=DEVICE, **GIVEN)
    assert {name: len(by_sae) for name, by_sae in results.items()} == dict.fromkeys(SMALL, 2)


def trained_a_little(config):
    sae = SampledTopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for number in range(20):
        given = step_input(torch.randn(256, 128, device=DEVICE), step=number)
        given.dead_neuron_mask = torch.zeros(160, dtype=torch.bool, device=DEVICE)
        sae.training_forward_pass(given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae
