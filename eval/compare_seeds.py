"""How alike are the dictionaries of several seeds? Mean max cosine similarity of all pairs, without a language model.

    python eval/compare_seeds.py saes/topk_seed0 saes/topk_seed1 saes/topk_seed2

Each argument is the folder of an SAE or of a training checkpoint, or RELEASE:SAE_ID. For every ordered pair: the mean
over the first one's latents of the largest cosine with a latent of the second, for decoder and encoder rows; the share
of its latents with a partner above 0.7 and 0.9; the one-to-one matched mean; and what random dictionaries would give.
"""

import argparse
from itertools import combinations

from sae_lens_sampled.dictionary_similarity import dictionary_similarity
from sae_lens_sampled.saebench.sources import EvalSAE, load_saes, parse_source


def rows(saes: list[EvalSAE]) -> list[list[str]]:
    table = []
    for a, b in combinations(saes, 2):
        decoder = dictionary_similarity(a.sae.W_dec, b.sae.W_dec)
        encoder = dictionary_similarity(a.sae.W_enc.T, b.sae.W_enc.T)
        for first, second, direction in ((a, b, "forward"), (b, a, "backward")):
            one, other = getattr(decoder, direction), getattr(encoder, direction)
            numbers = [one.mmcs, other.mmcs, one.mmcs_absolute, one.share_above_0_7, one.share_above_0_9]
            numbers += [decoder.matched, one.baseline]
            table.append([first.name, second.name, *(f"{x:.3f}" if x is not None else "-" for x in numbers)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    saes = load_saes([parse_source(sae) for sae in args.saes], args.device)
    if len(saes) < 2:
        parser.error("comparing needs at least two SAEs.")
    head = ["of", "in", "decoder", "encoder", "decoder, absolute", "> 0.7", "> 0.9", "matched", "random"]
    for row in [head, ["---"] * len(head), *rows(saes)]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
