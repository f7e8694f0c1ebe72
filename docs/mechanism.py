"""Draw docs/mechanism.svg: the entries that BatchTopK and Sampled-SAE keep of the same small batch.

python docs/mechanism.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.selection import sampled_topk

TOKENS, LATENTS, K, POOL_FACTOR = 8, 12, 2, 2
FILE = Path(__file__).with_suffix(".svg")
POOLED, KEPT = "#d55e00", "#0072b2"


def main() -> None:
    acts = activations()
    of_batchtopk, _ = select(acts, None)
    of_pool, pool = select(acts, POOL_FACTOR)
    plt.rcParams |= {"svg.hashsalt": "mechanism", "font.size": 9, "svg.fonttype": "none"}
    figure, panels = plt.subplots(2, 3, figsize=(10, 3.6), height_ratios=(1, 3), sharex=True, layout="constrained")
    for axes in panels[0]:
        axes.axis("off")
    panels[0, 1].axis("on")
    panels[0, 1].bar(range(LATENTS), acts.norm(dim=0), color=[POOLED if i in pool else "0.8" for i in range(LATENTS)])
    panels[0, 1].set(title=f"1. Score all latents, pool the best {K * POOL_FACTOR}", yticks=[], xticks=[])
    panels[0, 1].spines[["top", "right", "left"]].set_visible(False)
    draw(panels[1, 0], acts, of_batchtopk, f"BatchTopK: the largest {K * TOKENS} entries")
    draw(panels[1, 1], acts, torch.zeros_like(acts), "The same batch, with its pool", pool)
    draw(panels[1, 2], acts, of_pool, f"2. The largest {K * TOKENS} entries in the pool", pool)
    panels[1, 0].set_ylabel("tokens")
    figure.savefig(FILE, metadata={"Date": None})


def activations() -> Tensor:
    """A batch with some consistent latents and some that fire once, far above the others."""
    generator = torch.Generator().manual_seed(4)
    acts = torch.rand(TOKENS, LATENTS, generator=generator).square()
    acts[:, [1, 4, 6, 9]] += 0.55
    acts[[1, 3, 6, 7], [2, 5, 8, 11]] = torch.tensor([1.7, 1.8, 1.6, 1.75])
    return acts


def select(acts: Tensor, pool_factor: float | None) -> tuple[Tensor, list[int]]:
    """Activations with 0 where they are not kept, and the pool."""
    cfg = SampledTopKTrainingSAEConfig(d_in=2, d_sae=LATENTS, k=K, pool_factor=pool_factor)
    kept, [pool] = sampled_topk(acts, cfg, draw=torch.tensor(0))
    return kept, pool.tolist()


def draw(axes: Axes, acts: Tensor, kept: Tensor, title: str, pool: list[int] | None = None) -> None:
    """Draw the batch as a grid: darker is larger, kept entries are coloured, pooled columns are framed."""
    axes.imshow(acts, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
    for token, latent in kept.nonzero().tolist():
        axes.add_patch(Rectangle((latent - 0.5, token - 0.5), 1, 1, color=KEPT, alpha=0.75, lw=0))
    for latent in pool or []:
        axes.add_patch(Rectangle((latent - 0.5, -0.5), 1, TOKENS, fill=False, edgecolor=POOLED, lw=1.5))
    axes.set(title=title, xlabel="latents", xticks=[], yticks=[])


if __name__ == "__main__":
    main()
