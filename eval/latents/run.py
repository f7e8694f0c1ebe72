"""The most active latents of some SAEs: what drives them, how well their token predicts them, a page for blind rating.

    python eval/latents/run.py --saes batchtopk=FOLDER one_pool=FOLDER groups=FOLDER --out latents_output
    python eval/latents/run.py --out latents_output --score ratings_1.csv ratings_2.csv   # readers' results by SAE

The SAEs are exports on one block's output in the model; training checkpoints are exported first. Needs captum (the
extra `latents`), for integrated gradients. Writes to `--out`: `page.html`, on which a reader rates latents and says on
which passages they fire, and `latents.json`, with the SAE of each latent and the correct answers. A reader's answers
are a CSV with the columns `id`, `rating` and `fires`, such as `001,3,2 5 7`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

import torch
from datasets import Dataset, load_dataset
from sae_lens import ActivationsStore

from bundled import HELD_OUT_TEXT, TINY_LM
from latents.describe import describe
from latents.page import blind, write_page
from latents.rating import read_answers
from latents.tables import agreement_texts, rating_table, table, token_table
from sae_lens_sampled.runners.hooks import switch_on
from sae_lens_sampled.runners.stores import reporting_short_text
from sae_lens_sampled.saebench import load_saes, parse_source
from sae_lens_sampled.saebench.models import attach, common_model_kwargs, load_model
from smollm2 import smollm2_folder


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.score:
        rows = json.loads((args.out / "latents.json").read_text())
        readers = {file.stem: read_answers(file) for file in args.score}
        names = {name: name for name in sorted({row["sae"] for row in rows})}
        print("\n\n".join([rating_table(rows, readers, names), *agreement_texts(readers)]))
        return
    loaded = load_saes([parse_source(named) for named in args.saes], "cpu")
    path = smollm2_folder() if args.model == "smollm2" else args.model
    model, saes = load_model(path, kwargs=common_model_kwargs(loaded)), {}
    for sae in loaded:
        attach(sae, model)
        check_place(sae.release, str(sae.sae.cfg.metadata.hook_name), str(loaded[0].sae.cfg.metadata.hook_name))
        switch_on(model.hooked, [str(sae.sae.cfg.metadata.hook_name)])
        saes[sae.release] = sae.sae
    prompts = held_out_prompts(model.hooked, next(iter(saes.values())), args)
    rows = blind(describe(model.hooked, saes, prompts, args.latents, args.seed), args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "latents.json").write_text(json.dumps(rows, indent=1) + "\n")
    write_page(rows, args.out / "page.html")
    names = {name: name for name in saes}
    print(f"{table(rows, names)}\n\n{token_table(rows, names)}")
    print(f"\nPage to rate: {args.out / 'page.html'}")


def check_place(name: str, hook: str, first: str) -> None:
    """Reject an SAE that is not on a block's output, to which latents are attributed, or on another than the first."""
    if not hook.endswith("hook_resid_post") or hook != first:
        sys.exit(
            f"SAE {name!r} is on {hook}, and the first on {first}; all must be on the output (hook_resid_post) of one "
            "block."
        )


def held_out_prompts(model: Any, sae: Any, args: argparse.Namespace) -> torch.Tensor:
    """Prompts from `--text`, by default held out from training, shape (prompts, context), with their first tokens.

    Raises:
        ValueError: if the text gives no prompt, or is shorter than asked for: its beginning would be in both halves.
    """
    of_file = {"path": "json", "data_files": args.text} if Path(args.text).is_file() else {"path": args.text}
    dataset = load_dataset(**of_file, split="train")
    assert isinstance(dataset, Dataset)
    with reporting_short_text(f"--text {args.text}"):
        store = ActivationsStore.from_sae(model, sae, dataset=dataset, context_size=args.context_size, device="cpu")
    with reporting_short_text(f"--text {args.text}", store):
        prompts = store.get_batch_tokens(args.tokens // args.context_size)
    if store.n_dataset_processed > len(dataset):
        raise ValueError(
            f"--text {args.text} has fewer tokens than --tokens {args.tokens}, so its beginning would be repeated; "
            "lower --tokens."
        )
    return prompts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--model", default=str(TINY_LM), help="smollm2, an official TransformerLens name or a folder")
    parser.add_argument("--text", default=str(HELD_OUT_TEXT), help="a JSONL file, a folder or a Hub data set")
    parser.add_argument("--latents", type=int, default=50, help="latents per SAE")
    parser.add_argument("--tokens", type=int, default=32_768, help="number of tokens to read")
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="seed for all draws and for the order on the page")
    parser.add_argument("--out", type=Path, default=Path("latents_output"))
    parser.add_argument(
        "--score", type=Path, nargs="+", metavar="CSV", help="print the results of readers' answers, by SAE"
    )
    args = parser.parse_args(argv)
    if not args.score and not args.saes:
        parser.error("--saes NAME=FOLDER or --score CSV is required")
    return args


if __name__ == "__main__":
    main()
