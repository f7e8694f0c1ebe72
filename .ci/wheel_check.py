"""First steps with an installed wheel.

Arguments: EXAMPLES, the repository's folder `examples`; OUTPUT, a new folder; and, to evaluate too, the extra `[eval]`.
"""

import json
import subprocess
import sys
from pathlib import Path

import sae_lens_sampled

examples, output, *extras = map(Path, sys.argv[1:])
command = Path(sys.executable).with_name("sae-lens-sampled")
LOAD = """
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
assert sae.cfg.architecture() == "jumprelu", sae.cfg
assert sae.encode(torch.randn(8, sae.cfg.d_in)).isfinite().all()
assert "sae_lens_sampled" not in sys.modules
"""


def run(*arguments: object) -> str:
    print("+", *arguments, flush=True)
    return subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True).stdout


assert "site-packages" in sae_lens_sampled.__file__, sae_lens_sampled.__file__
assert run(command, "--version").strip() == sae_lens_sampled.__version__
print(run(command, "info"))
# fmt: off
run(
    command, "train", "--architecture", "sampled_topk", "--model_class_name", "AutoModelForCausalLM",
    "--model_name", examples / "tiny_lm", "--hook_name", "gpt_neox.layers.2",
    "--dataset_path", examples / "tiny_lm/text", "--is_dataset_tokenized", "False", "--d_in", 128, "--d_sae", 512,
    "--k", 8, "--pool_factor", 4,
    "--pool_group_size", 16, "--context_size", 64, "--training_tokens", 20 * 256, "--train_batch_size_tokens", 256,
    "--store_batch_size_prompts", 8, "--n_batches_in_buffer", 8, "--log_to_wandb", "False",
    "--output_path", output / "sae", "--checkpoint_path", output / "checkpoints",
)
# fmt: on
run(sys.executable, "-W", "ignore", "-c", LOAD, output / "sae")
if extras:
    small = ["--set", "core.n_eval_reconstruction_batches=2", "--set", "core.n_eval_sparsity_variance_batches=2"]
    saes = f"sampled={output / 'sae'}"
    model = ["--model", examples / "tiny_lm", "--text", examples / "tiny_lm/text", "--device", "cpu"]
    run(command, "eval", saes, "--evals", "core", *model, "--output-dir", output / "results", *small)
    (result,) = (output / "results" / "eval_results" / "core").glob("*.json")
    assert json.loads(result.read_text())["eval_result_metrics"]["sparsity"]["l0"] > 0
print("The wheel works.")
