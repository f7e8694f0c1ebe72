"""Run the MMCS eval on SAEs: `python -m sae_lens_sampled.saebench.mmcs.main --help`."""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from sae_bench.sae_bench_utils import general_utils, get_eval_uuid, get_sae_bench_version, get_sae_lens_version
from sae_bench.sae_bench_utils.sae_selection_utils import get_saes_from_regex
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_sampled.dictionary_similarity import Similarity, dictionary_similarity
from sae_lens_sampled.saebench.mmcs.eval_config import MmcsEvalConfig
from sae_lens_sampled.saebench.mmcs.eval_output import (
    MmcsEvalOutput,
    MmcsMetricCategories,
    MmcsMetrics,
    MmcsPartnerMetrics,
    MmcsResultDetail,
)
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID

logger = logging.getLogger(__name__)


def run_eval(
    config: MmcsEvalConfig,
    selected_saes: Sequence[tuple[str, Any]],
    device: str,
    output_path: str,
    force_rerun: bool = False,
    densities: Mapping[str, Sequence[float]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare every SAE with every other one and write one result file per SAE.

    The metrics of an SAE are means over the other SAEs of its group, or over all others if it is alone in its group.
    An SAE whose file exists is skipped, even if there are other partners now. Each pair is computed once. All SAEs are
    in memory, but only two of them need to be on `device`.

    Args:
        config: what to count as live, and what to match.
        selected_saes: at least two, as for SAEBench's evals: (name, SAE) or (release, sae_id).
        device: where to compute.
        output_path: folder of the result files.
        force_rerun: whether to compute and replace files that exist.
        densities: share of tokens that each latent is active on, by SAE, for the metrics of live latents.
        groups: group by SAE, such as its configuration without the seed; None if all are of one.

    Returns:
        What was written now, by SAE. Here and in `densities` and `groups`, an SAE is called as its file is:
        <release>_<sae_id>, or <name>_custom_sae, with "_" for "/".

    Raises:
        ValueError: if there are fewer than two SAEs, two of one name, SAEs that differ in `d_sae`, `d_in` or
            `hook_name`, or if `densities` or `groups` are of other SAEs.
    """
    sae_ids = [sae if isinstance(sae, str) else CUSTOM_SAE_ID for _, sae in selected_saes]
    releases = [release for release, _ in selected_saes]
    paths = [
        Path(general_utils.get_results_filepath(output_path, release, sae_id))
        for release, sae_id in zip(releases, sae_ids, strict=True)
    ]
    names = [path.name.removesuffix("_eval_results.json") for path in paths]
    _check_names(names, densities, groups)
    pending = {i for i, path in enumerate(paths) if force_rerun or not path.exists()}
    for i, name in enumerate(names):
        if i not in pending:
            logger.info("Skipping %s as results already exist", name)
    if not pending:
        return {}

    saes = [_load(release, sae, device) for release, sae in selected_saes]
    check_alike(names, saes)
    live = [_live_latents(name, densities, config.live_density, saes[0].cfg.d_sae) for name in names]
    run = {
        "eval_config": config,
        "eval_id": get_eval_uuid(),
        "sae_bench_commit_hash": get_sae_bench_version(),
        "sae_lens_version": get_sae_lens_version(),
    }
    results: dict[str, dict[str, Any]] = {}
    details: list[list[MmcsResultDetail]] = [[] for _ in names]
    pairs = [pair for pair in combinations(range(len(names)), 2) if pending.intersection(pair)]
    for i, j in tqdm(pairs, desc="Running MMCS on all pairs of SAEs"):
        forward, backward = _compare(saes[i], saes[j], live[i], live[j], config.match_max_latents, device)
        same_group = groups is None or groups[names[i]] == groups[names[j]]
        details[i].append(MmcsResultDetail(partner=names[j], same_group=same_group, **forward))
        details[j].append(MmcsResultDetail(partner=names[i], same_group=same_group, **backward))
        for one in pending.intersection((i, j)):
            if len(details[one]) < len(names) - 1:
                continue
            output = MmcsEvalOutput(
                **run,
                datetime_epoch_millis=int(time.time() * 1000),
                eval_result_metrics=_mean_metrics(details[one], live[one]),
                eval_result_details=details[one],
                sae_lens_id=sae_ids[one],
                sae_lens_release_id=releases[one],
                sae_cfg_dict=saes[one].cfg.to_dict(),
            )
            _write(output, paths[one])
            results[names[one]] = asdict(output)
    return results


def _check_names(names: list[str], densities: Mapping[str, Any] | None, groups: Mapping[str, Any] | None) -> None:
    if len(names) < 2:
        raise ValueError(f"selected_saes has {len(names)} SAEs; MMCS compares SAEs, so pass at least 2.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two of selected_saes are called {name!r}; give them different names.")
    for argument, given in (("densities", densities), ("groups", groups)):
        if given is not None and set(given) != set(names):
            raise ValueError(
                f"{argument} is for the SAEs {sorted(given)}, but selected_saes are {sorted(names)}; "
                "pass one entry for each of these."
            )


def _load(release: str, sae: Any, device: str) -> Any:
    loaded = general_utils.load_and_format_sae(release, sae, device)
    assert loaded is not None
    return loaded[1]


def check_alike(names: list[str], saes: list[Any]) -> None:
    """Raise the ValueError of `run_eval` for SAEs that differ in width or hook; they need not be loaded by SAEBench."""
    for field in ("d_sae", "d_in", "hook_name"):
        values = [general_utils._get_cfg_meta_field(sae.cfg, field) for sae in saes]
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{name!r} has {field}={value!r}, but {names[0]!r} has {field}={values[0]!r}; "
                    "run the eval on SAEs of one width and one hook at a time."
                )


def _live_latents(
    name: str, densities: Mapping[str, Sequence[float]] | None, live_density: float, d_sae: int
) -> Tensor | None:
    if densities is None:
        return None
    if len(densities[name]) != d_sae:
        raise ValueError(f"densities[{name!r}] has {len(densities[name])} entries; it needs one per latent, {d_sae}.")
    return torch.tensor(densities[name], dtype=torch.double) > live_density


def _compare(
    one: Any, other: Any, live_one: Tensor | None, live_other: Tensor | None, match_max_latents: int, device: str
) -> tuple[dict[str, MmcsMetrics], dict[str, MmcsMetrics]]:
    """The metrics of one SAE with another as its partner, by decoder and encoder, and those of the other."""
    forward, backward = {}, {}
    for part in ("decoder", "encoder"):
        a, b = _rows(one, part, device), _rows(other, part, device)
        similarity = dictionary_similarity(a, b, match_max_latents)
        live_similarity = None
        if live_one is not None and live_other is not None and live_one.any() and live_other.any():
            live_similarity = similarity
            if not (live_one.all() and live_other.all()):
                a, b = a[live_one.to(a.device)], b[live_other.to(b.device)]
                live_similarity = dictionary_similarity(a, b, match_max_latents)
        forward[part] = _metrics(similarity, live_similarity)
        backward[part] = _metrics(similarity.swapped(), live_similarity.swapped() if live_similarity else None)
    return forward, backward


def _rows(sae: Any, part: str, device: str) -> Tensor:
    return (sae.W_dec if part == "decoder" else sae.W_enc.T).detach().to(device)


def _metrics(similarity: Similarity, live: Similarity | None) -> MmcsMetrics:
    fields: dict[str, float | None] = {}
    for prefix, numbers in (("", similarity), ("live_", live)):
        if numbers is None:
            continue
        fields |= {f"{prefix}{name}": value for name, value in numbers.forward._asdict().items()}
        fields |= {f"{prefix}{name}_reverse": value for name, value in numbers.backward._asdict().items()}
        fields[f"{prefix}matched"] = numbers.matched
    return MmcsMetrics(**fields)  # type: ignore[arg-type]  # only `matched` may be None


def _mean_metrics(details: list[MmcsResultDetail], live: Tensor | None) -> MmcsMetricCategories:
    same_group = [detail for detail in details if detail.same_group]
    partners = same_group or details
    return MmcsMetricCategories(
        decoder=_mean([detail.decoder for detail in partners]),
        encoder=_mean([detail.encoder for detail in partners]),
        partners=MmcsPartnerMetrics(
            n_partners=len(partners),
            partners_of_same_group=bool(same_group),
            n_live=None if live is None else int(live.sum()),
        ),
    )


def _mean(metrics: list[MmcsMetrics]) -> MmcsMetrics:
    """Field by field, over the partners for which there is a number."""
    fields = {}
    for name in asdict(metrics[0]):
        values = [value for one in metrics if (value := getattr(one, name)) is not None]
        fields[name] = statistics.fmean(values) if values else None
    return MmcsMetrics(**fields)


def _write(output: MmcsEvalOutput, path: Path) -> None:
    """Write beside `path`, then rename: whoever finds the file finds all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        output.to_json_file(str(unfinished), indent=2)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def arg_parser() -> argparse.ArgumentParser:
    """The flags, as those of SAEBench's evals."""
    default_config = MmcsEvalConfig()
    parser = argparse.ArgumentParser(description="Run MMCS evaluation on all pairs of the selected SAEs")
    parser.add_argument("--model_name", type=str, required=True, help="Model name, which is only recorded")
    parser.add_argument("--sae_regex_pattern", type=str, required=True, help="Regex pattern for SAE selection")
    parser.add_argument("--sae_block_pattern", type=str, required=True, help="Regex pattern for SAE block selection")
    parser.add_argument("--output_folder", type=str, default="eval_results/mmcs", help="Output folder")
    parser.add_argument(
        "--match_max_latents",
        type=int,
        default=default_config.match_max_latents,
        help="SAEs of more latents are not matched one to one",
    )
    parser.add_argument("--force_rerun", action="store_true", help="Force rerun of experiments")
    return parser


def create_config_and_selected_saes(args: argparse.Namespace) -> tuple[MmcsEvalConfig, list[tuple[str, str]]]:
    """The config, and the pairs (release, sae_id) whose release and id match the patterns."""
    config = MmcsEvalConfig(model_name=args.model_name, match_max_latents=args.match_max_latents)
    selected_saes = get_saes_from_regex(args.sae_regex_pattern, args.sae_block_pattern)
    for release, sae_id in selected_saes:
        logger.info("Selected SAE: %s, %s", release, sae_id)
    return config, selected_saes


def main(argv: list[str] | None = None) -> None:
    """Run the eval as the command line says."""
    args = arg_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.time()
    config, selected_saes = create_config_and_selected_saes(args)
    device = general_utils.setup_environment()
    run_eval(config, selected_saes, device, args.output_folder, args.force_rerun)
    logger.info("Finished evaluation in %.2f seconds", time.time() - start)


if __name__ == "__main__":
    main()
