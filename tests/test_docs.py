"""The docs: links in pages kept elsewhere in the repository, and the examples of the API reference."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, randomise, step_input
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

import sae_lens_sampled
from bundled import TINY_LM
from sae_lens_sampled import SCORES, SampledTopKTrainingSAE

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("docs_links", ROOT / "docs" / "links.py")
assert SPEC is not None
assert SPEC.loader is not None
links = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(links)

PAGES = (
    "index.md",
    "mechanism.svg",
    "training.md",
    "eval/RESULTS.md",
    "eval/SPEED.md",
    "eval/results/known_features.md",
)


def on_site(markdown, page="eval/RESULTS.md", repo_url=None):
    def file(name, included=True):
        inclusion = SimpleNamespace(is_included=lambda: included)
        return SimpleNamespace(src_uri=name, abs_src_path=str(ROOT / "docs" / name), inclusion=inclusion)

    files = [*map(file, PAGES), file("eval/results/check_export.json", included=False)]
    config = SimpleNamespace(repo_url=repo_url)
    return links.on_page_markdown(markdown, page=SimpleNamespace(file=file(page)), config=config, files=files)


@pytest.mark.parametrize(
    ("link", "want"),
    [
        ("[speed](SPEED.md)", "[speed](SPEED.md)"),
        ("[tables](results/known_features.md#a)", "[tables](results/known_features.md#a)"),
        ("[home](../README.md)", "[home](../index.md)"),
        ("[guide](../docs/training.md)", "[guide](../training.md)"),
        ("[code](study/configs.py)", "code"),  # not a page, and no repository to link to
        ("[data](results/check_export.json)", "data"),
        ("![plot](results/known_features.png)", "![plot](results/known_features.png)"),
        ("[nothing](study/lost.py)", "[nothing](study/lost.py)"),  # mkdocs reports it
        ("[out](https://arxiv.org/abs/2508.21324)", "[out](https://arxiv.org/abs/2508.21324)"),
    ],
)
def test_links_lead_to_pages_of_the_site(link, want):
    assert on_site(f"See {link}.\n") == f"See {want}.\n"


def test_code_is_left_alone():
    code = "Text.\n\n```python\nx = table[0](study/configs.py)\n```\n"
    assert on_site(code) == code


def test_links_to_other_files_lead_into_the_repository():
    url = "https://example.org/me/sae_lens_sampled/"
    code = on_site("[code](study/configs.py#L3), [folder](study)", repo_url=url)
    assert code == f"[code]({url}blob/main/eval/study/configs.py#L3), [folder]({url}tree/main/eval/study)"


def test_links_from_the_first_page_are_relative_to_the_site():
    page = on_site("[results](eval/RESULTS.md) [training](docs/training.md) ![a](docs/mechanism.svg)", page="index.md")
    assert page == "[results](eval/RESULTS.md) [training](training.md) ![a](mechanism.svg)"


def test_every_page_that_is_a_link_leads_to_a_file():
    links_in_docs = [path for path in (ROOT / "docs").rglob("*") if path.is_symlink()]
    assert len(links_in_docs) >= 8
    assert all(path.exists() and path.resolve().is_relative_to(ROOT) for path in links_in_docs)


@pytest.fixture
def scores_restored():
    known = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(known)


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs" / "api").glob("*.md")), ROOT / "docs" / "extending.md"], ids=lambda page: page.stem
)
def test_the_examples_of_pages_run(page, tmp_path, monkeypatch, scores_restored):
    """Run the examples of a page in order, as a reader would, with the bundled model as MODEL and TEXT."""
    if page.stem == "evaluation":
        pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"MODEL": str(TINY_LM), "TEXT": str(TINY_LM / "text")}
    for block in blocks:
        exec(block, names)


def test_the_column_score_of_the_guide_is_the_mean_of_active(scores_restored):
    page = (ROOT / "docs" / "extending.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    acts = activations(3 * 16).reshape(3, 16, -1).relu()
    acts[..., 0] = 0
    want = [[a[a > 0].mean() if (a > 0).any() else torch.tensor(0.0) for a in group.T] for group in acts]
    torch.testing.assert_close(SCORES["mean_of_active"](acts, 4), torch.tensor(want))


def test_every_public_name_is_on_a_page_and_in_an_example():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: [\w.]+\.(\w+)$", text, flags=re.MULTILINE)
    used = "".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    for name in sae_lens_sampled.__all__:
        assert name in described, name
        assert re.search(rf"\b{name}\b", used), name


@pytest.mark.parametrize("step", ["dense", "kept"])
def test_the_recipe_for_a_batchtopk_script_trains_the_same_sae(step):
    page = (ROOT / "docs" / "training.md").read_text()
    code = page.split("## From a BatchTopK script")[1].split("```python\n")[1].split("```")[0]
    sizes = f"d_in={D_IN}, d_sae={D_SAE}, k={K}"
    assert "d_in=768, d_sae=16384, k=64" in code
    cfg = eval(code.strip().replace("d_in=768, d_sae=16384, k=64", sizes), vars(sae_lens_sampled))
    cfg.step = step
    ours = SampledTopKTrainingSAE(cfg)
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    optimizers = []
    for sae in (ours, theirs):
        randomise(sae)
        optimizers.append(torch.optim.Adam(sae.parameters(), lr=3e-3))
    for number in range(20):
        given = step_input(activations(64, seed=number), n_dead=number % 9, step=number)
        for sae, optimizer in zip((ours, theirs), optimizers, strict=True):
            sae.training_forward_pass(given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-4, atol=0)
