"""Worker process, alone or one of several that train one SAE; its imports happen before it is forked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import config_of, sae_of
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig

D_IN, D_SAE, K, TOKENS = 16, 96, 3, 64


def batches(n_steps, dyadic):
    """Batches of all ranks' tokens; dyadic ones have few bits, so that every sum in a step is exact."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(n_steps):
        x = torch.randn(TOKENS, D_IN, generator=generator) * torch.linspace(0.5, 2, D_IN) + 0.3
        yield (x * 4).round() / 4 if dyadic else x


def train(case, rank, count):
    case = dict(case)
    n_steps, dyadic, window = case.pop("n_steps", 24), case.pop("dyadic", False), case.pop("window", 4)
    torch.manual_seed(rank)  # different weights on every rank, until rank 0 broadcasts its own
    fields = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "pool_factor": 5, **case}
    sae = sae_of(config_of(fields))
    if dyadic:
        for parameter in sae.parameters():
            parameter.data.copy_((parameter.data * 8).round() / 8)
    if rank == 0:
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T  # laid out by latent, as a step may leave it
    n_bytes = 0
    if count > 1:
        sae.data_parallel()
    n_own = TOKENS // count
    config = SAETrainerConfig(
        total_training_samples=n_own * n_steps,
        train_batch_size_samples=n_own,
        lr=3e-3,
        lr_end=3e-3,
        dead_feature_window=window,
    )
    own = (x[rank * n_own :][:n_own] for x in batches(n_steps, dyadic))
    if "d_out" in case:
        own = (torch.cat([x, x[:, : case["d_out"]].relu()], dim=1) for x in own)
    trainer = SAETrainer(config, sae, own)
    trainer.fit()
    if count > 1:
        n_bytes = sae.ranks.n_bytes / n_steps
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    return {
        "state": sae.state_dict(),
        "gradients": gradients,
        "since_fired": trainer.n_forward_passes_since_fired,
        "n_bytes": n_bytes,
        "scans": sae.scan_record,
    }


def work(rank: int, count: int, cases: Sequence[dict[str, Any]], folder: Path) -> None:
    """Train an SAE for every case and write the results to `folder/COUNT_RANK.pt`."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init_{count}", rank=rank, world_size=count)
    torch.save([train(case, rank, count) for case in cases], folder / f"{count}_{rank}.pt")
    if count > 1:
        dist.destroy_process_group()
