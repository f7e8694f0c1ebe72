"""What latents are: attributions that add up, and a page that does not tell whose latents it shows."""

import json
import math
import re

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")
pytest.importorskip("captum", reason="needs the extra `latents`")

from eval_helpers import HOOK, TINY_LM
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from latents import run as script
from latents.attribution import Attribution, attribute, coherence
from latents.describe import most_active
from latents.rating import blind, read_ratings, score, write_page
from sae_lens_sampled.saebench.models import load_model


@pytest.fixture(scope="module")
def model():
    return load_model(TINY_LM).hooked


@pytest.fixture(scope="module")
def sae(activations):
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name=str(TINY_LM), hook_name=HOOK, prepend_bos=True)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64, metadata=metadata))
    sae.b_enc.data = -(activations[:2000] @ sae.W_enc).quantile(0.97, dim=0)  # fires on some 3 % of the tokens
    return sae


def test_attribution_is_the_integral_of_the_gradient(model, sae):
    tokens, latent = torch.tensor([0, 50, 60, 70, 80]), 3
    layer = int(HOOK.split(".")[1])
    text = model.input_to_embed(tokens[None])[0][0].detach()
    baseline = text.mean(dim=0)

    def pre_activation(embeddings):
        state = model(embeddings[None], start_at_layer=0, stop_at_layer=layer + 1)[0, -1]
        return (state - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent]

    want = torch.zeros(5)
    n = 400
    for step in range(n):
        point = (baseline + (step + 0.5) / n * (text - baseline)).requires_grad_()
        [gradient] = torch.autograd.grad(pre_activation(point), point)
        for token in range(5):
            want[token] += (gradient[token] * (text[token] - baseline)).sum() / n
    found = attribute(model, sae, latent, tokens, baseline)
    torch.testing.assert_close(found.scores, want, rtol=1e-3, atol=1e-4)
    difference = pre_activation(text) - pre_activation(baseline.expand(5, -1))
    assert found.difference == pytest.approx(difference.item(), rel=1e-4)
    assert found.completeness_error < 1e-3
    assert attribute(model, sae, latent, tokens, baseline, n_steps=1).completeness_error > 1e-3


def test_shares_and_effective_tokens():
    one = Attribution(torch.tensor([0.0, 0.0, -2.0]), -2.0)
    assert (one.own_share, one.n_tokens, one.completeness_error) == (1, 1, 0)
    four = Attribution(torch.tensor([1.0, -1.0, 1.0, 1.0]), 4.0)
    assert (four.own_share, four.completeness_error) == (0.25, 0.5)
    assert four.n_tokens == pytest.approx(4)


def test_coherence_is_the_mean_cosine_of_pairs():
    states, mean = torch.randn(4, 6), torch.randn(6)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    want = sum(torch.cosine_similarity(states[i] - mean, states[j] - mean, dim=0).item() for i, j in pairs) / len(pairs)
    assert coherence(states, mean) == pytest.approx(want, abs=1e-6)


def test_the_most_active_latents_are_not_dense_and_not_at_a_beginning():
    sae = StandardSAE(StandardSAEConfig(d_in=3, d_sae=3))
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(torch.eye(3) if name.startswith("W") else torch.zeros_like(value))
    states = torch.zeros(64, 21, 3)
    states[:, 1:, 0] = 1.0  # dense
    states[:, 0, 1] = 100.0  # only at beginnings, but for one place each in a few prompts
    for prompt, value in ((5, 3.0), (25, 2.0), (45, 1.0)):
        states[prompt, 7, 1] = value
        states[prompt, 9, 2] = value / 2
    statistics, places = most_active(sae, states, 2)
    assert places == {1: [(5, 7), (25, 7), (45, 7)], 2: [(5, 9), (25, 9), (45, 9)]}
    assert statistics.density[1].item() == pytest.approx(3 / (64 * 20))


ROWS = [
    {"sae": name, "latent": latent, "contexts": [{"before": "a <b>", "token": f"t{latent}", "after": "c"}]}
    for name in ("secret_one", "secret_two")
    for latent in range(10)
]


def test_the_page_does_not_tell_whose_latents_it_shows(tmp_path):
    rows = blind(ROWS, seed=0)
    assert [row["id"] for row in rows] == [f"{number:03}" for number in range(1, 21)]
    assert {row["sae"] for row in rows[:6]} == {"secret_one", "secret_two"}
    assert blind(ROWS, seed=1) != rows
    write_page(rows, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "secret" not in page
    assert "a &lt;b&gt;<mark>t" in page
    assert re.findall(r"<h2>(\d+)</h2>", page) == [row["id"] for row in rows]
    assert len(re.findall(r'<input type="radio"', page)) == 20 * 4


def test_ratings_are_given_back_to_their_saes(tmp_path):
    rows = blind(ROWS, seed=0)
    of = {name: [row["id"] for row in rows if row["sae"] == name] for name in ("secret_one", "secret_two")}
    lines = [f"{of['secret_one'][0]},4", f"{of['secret_one'][1]},2", f"{of['secret_two'][0]},1"]
    (tmp_path / "ratings.csv").write_text("\n".join(["id,rating", *lines]) + "\n")
    one, two = score(rows, read_ratings(tmp_path / "ratings.csv"))
    assert (one["sae"], one["rated"], one["mean"], one["error"], one["clear"]) == ("secret_one", 2, 3, 1, 0.5)
    assert (two["rated"], two["mean"], two["clear"]) == (1, 1, 0)
    assert math.isnan(two["error"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rating\n001,5\n", r"rating '5' of latent 001 must be of \[1, 2, 3, 4\]"),
        ("id,mark\n001,4\n", "must have the columns id and rating"),
        ("", "must have the columns id and rating"),
        ("id,rating\n999,4\n", "ratings of latents that are not of this page: 999"),
    ],
)
def test_other_ratings_are_refused(tmp_path, text, message):
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        score(blind(ROWS, seed=0), read_ratings(tmp_path / "ratings.csv"))


def test_from_saes_to_the_page_and_back(sae, tmp_path, capsys):
    sae.save_model(tmp_path / "sae")
    out = tmp_path / "out"
    folder = str(tmp_path / "sae")
    options = ["--latents", "2", "--tokens", "2048", "--out", str(out)]
    script.main(["--saes", f"one={folder}", f"two={folder}", *options])
    assert "| one |" in capsys.readouterr().out
    rows = json.loads((out / "latents.json").read_text())
    assert sorted(row["sae"] for row in rows) == ["one", "one", "two", "two"]
    assert all(row["completeness_error"] < 0.01 and 0 < row["own_share"] <= 1 for row in rows)
    (tmp_path / "ratings.csv").write_text("id,rating\n001,4\n")
    script.main(["--out", str(out), "--score", str(tmp_path / "ratings.csv")])
    assert f"| {rows[0]['sae']} | 1 | 4.00" in capsys.readouterr().out
