"""SAEs and folders to upload, and helpers to read the result."""

import torch
import yaml
from helpers import D_SAE, sampled_sae, train
from safetensors.torch import save_file

from sae_lens_sampled import to_jumprelu

REPO = "alice/sweep"


def trained(pool_factor=4.0, **fields):
    sae = sampled_sae(pool_factor=pool_factor, pool_group_size=16, **fields)
    sae.cfg.metadata.model_name = "pythia-160m-deduped"
    sae.cfg.metadata.dataset_path = "monology/pile-uncopyrighted"
    sae.cfg.metadata.hook_name = "blocks.6.hook_resid_post"
    train(sae, 5)
    return sae


def as_folder(sae, folder):
    to_jumprelu(sae).save_model(folder)
    return folder


def as_checkpoint(sae, folder):
    sae.save_model(folder)
    save_file({"sparsity": torch.linspace(-9, -1, D_SAE)}, folder / "sparsity.safetensors")
    (folder / "runner_cfg.json").write_text('{"lr": 0.001}')
    return folder


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def split_row(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
