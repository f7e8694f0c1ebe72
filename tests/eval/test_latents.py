"""Descriptions of latents: attributions add up, and places and passages are what they are said to be."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")
pytest.importorskip("captum", reason="needs the extra `latents`")

from eval_helpers import HOOK, TINY_LM
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from latents import run as script
from latents.attribution import Attribution, attribute, coherence
from latents.describe import draw, shown, told_by_token
from latents.firings import Firings, Text
from latents.places import Passage, Place
from latents.token_alone import TokenRates, commonest, learn, token_scores
from sae_lens_sampled.saebench.models import load_model


@pytest.fixture(scope="module")
def model():
    return load_model(TINY_LM).hooked


@pytest.fixture(scope="module")
def sae(activations):
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name=str(TINY_LM), hook_name=HOOK, prepend_bos=True)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64, metadata=metadata))
    sae.b_enc.data = -(activations[:2000] @ sae.W_enc).quantile(0.97, dim=0)  # fires on about 3 % of the tokens
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


def test_firings_are_the_activations_without_zeros_and_first_tokens(sae):
    states = torch.randn(19, 7, 128) * 20  # more prompts than are encoded at once
    firings = Firings(sae, states)
    with torch.no_grad():
        want = sae.encode(states)
    want[:, 0] = 0
    for latent in range(64):
        torch.testing.assert_close(firings.acts(latent), want[..., latent], rtol=1e-4, atol=1e-3)
        assert firings.density[latent].item() == pytest.approx((want[..., latent] > 0).sum().item() / (19 * 6))
    assert (want > 0).any()


def test_leading_latents_carry_most_and_are_not_dense_and_not_at_a_beginning():
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=4))
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            value.copy_(torch.eye(4) if name.startswith("W") else torch.zeros_like(value))
    states = torch.zeros(64, 21, 4)
    states[:, 1:, 0] = 1.0  # dense
    states[:, 0, 3] = 100.0  # only at beginnings
    states[[5, 25, 45], 7, 1] = 1.5
    states[[5, 25], 9, 2] = 2.5
    firings = Firings(sae, states)
    assert firings.leading() == [2, 1]
    assert firings.density[1].item() == pytest.approx(3 / (64 * 20))


class Numbers:
    """A tokenizer that decodes every token to its number."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"{token} " for token in tokens)


def some_text() -> tuple[Text, torch.Tensor]:
    """A text in which every token occurs once, and the activations of a latent on it."""
    prompts = torch.arange(60 * 65).reshape(60, 65)
    acts = torch.rand(60, 65) * (torch.rand(60, 65) < 0.04)
    acts[:, 0] = 0
    model: Any = SimpleNamespace(tokenizer=Numbers())
    return Text(model, prompts, torch.zeros(60, 65, 3)), acts


def drawn(text: Text, acts: torch.Tensor, seed: int = 0) -> tuple[list[Place], list[Passage]]:
    found = draw(text, acts, random.Random(seed))
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(4))
def test_places_are_of_the_first_half_passages_and_their_answers_of_the_second(seed):
    text, acts = some_text()
    places, passages = drawn(text, acts, seed)
    row = shown(text, acts, places, passages)
    flat = acts.flatten()
    levels = sorted(flat[flat > 0].tolist())
    for context in row["contexts"]:
        [token] = map(int, context["token"].split())
        assert token < 30 * 65
        assert context["activation"] == flat[token] > 0
        assert context["band"] == levels.index(context["activation"]) * 5 // len(levels) + 1
        prompt, at = divmod(token, 65)
        before = range(prompt * 65 + max(1, at - 31), token)
        after = range(token + 1, min((prompt + 1) * 65, token + 9))
        assert [int(n) for n in context["before"].split()] == list(before)
        assert [int(n) for n in context["after"].split()] == list(after)
    assert [context["band"] for context in row["contexts"]] == [5, 4, 3, 2, 1, 5, 4, 3]
    for number, passage in enumerate(row["passages"], start=1):
        tokens = [int(n) for n in passage["text"].split()]
        assert tokens == list(range(tokens[0], tokens[0] + 16))
        assert [int(n) for n in passage["before"].split()] == list(range(tokens[0] - 16, tokens[0]))
        assert tokens[0] >= 30 * 65
        assert (max(acts.flatten()[token] for token in tokens) > 0) == (number in row["fires"])
    assert row["n_same_token"] == 1


def test_the_number_of_equal_tokens_is_kept():
    text, acts = some_text()
    text.prompts[acts > 0] = 7
    text.prompts[(acts > 0) & (torch.rand(60, 65) < 0.3)] = 8
    places, passages = drawn(text, acts)
    tokens = [int(text.prompts[prompt, at]) for prompt, at, _ in places]
    assert shown(text, acts, places, passages)["n_same_token"] == max(tokens.count(7), tokens.count(8)) < 8


def text_and_firings() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, some of them rare, and firings of a latent whose rate depends on the token; never on first tokens."""
    tokens = (torch.rand(9, 65).square() * 40).long()
    fires = torch.rand(9, 65) < torch.linspace(0.15, 0.0, 40)[tokens]
    fires[:, 0] = False
    return tokens, fires


def balanced_accuracy(said: list[bool], truth: list[bool]) -> float:
    hits = [s for s, t in zip(said, truth, strict=True) if t]
    silent = [not s for s, t in zip(said, truth, strict=True) if not t]
    return (sum(hits) / len(hits) + sum(silent) / len(silent)) / 2


def test_rates_and_thresholds_are_those_of_a_count():
    tokens, fires = text_and_firings()
    known = learn(tokens, fires, n_vocabulary=45)
    places = [(p, a) for p in range(9) for a in range(1, 65)]
    overall = sum(fires[place].item() for place in places) / len(places)

    def rate(token, left_out=None):
        seen = [fires[place].item() for place in places if tokens[place] == token and place != left_out]
        return (sum(seen) + overall) / (len(seen) + 1)

    assert known.rates.tolist() == pytest.approx([rate(token) for token in range(45)])
    assert known.rates[44].item() == pytest.approx(overall)  # a token that does not occur
    rates = {place: rate(tokens[place].item(), left_out=place) for place in places}
    truth = [bool(fires[place]) for place in places]
    best = max(balanced_accuracy([rates[p] >= t for p in places], truth) for t in set(rates.values()))
    found = balanced_accuracy([rates[p] >= known.at_places - 1e-9 for p in places], truth)
    assert found == pytest.approx(best)

    scores, truth = [], []
    for prompt in range(9):
        for start in (17, 33, 49):
            silent = 1.0
            for at in range(start, start + 16):
                silent *= 1 - rates[prompt, at]
            scores.append(1 - silent)
            truth.append(bool(fires[prompt, start : start + 16].any()))
    best = max(balanced_accuracy([s >= t for s in scores], truth) for t in scores)
    found = balanced_accuracy([s >= known.in_passages - 1e-9 for s in scores], truth)
    assert found == pytest.approx(best)


def test_scores_of_the_token_alone_are_those_of_loops():
    tokens, fires = text_and_firings()
    known = TokenRates(torch.rand(40).double(), at_places=0.5, in_passages=0.5)
    rates, truth = known.rates[tokens[:, 1:]].flatten().tolist(), fires[:, 1:].flatten().tolist()
    precision = recall = 0.0
    for threshold in sorted(set(rates), reverse=True):
        hits = [t for r, t in zip(rates, truth, strict=True) if r >= threshold]
        precision += (sum(hits) / sum(truth) - recall) * sum(hits) / len(hits)
        recall = sum(hits) / sum(truth)
    found = token_scores(known, tokens, fires)
    assert found["token_precision"] == pytest.approx(precision)
    assert found["token_accuracy"] == pytest.approx(balanced_accuracy([r >= 0.5 for r in rates], truth))


def test_the_token_says_nothing_of_a_latent_that_fires_at_random():
    tokens = torch.randint(0, 900, (400, 65))
    fires = torch.rand(400, 65) < 0.1
    known = learn(tokens[:200], fires[:200], 900)
    found = token_scores(known, tokens[200:], fires[200:])
    assert found["token_precision"] == pytest.approx(0.1, abs=0.02)
    assert found["token_accuracy"] == pytest.approx(0.5, abs=0.02)


def test_the_commonest_token_and_its_share():
    fires = torch.tensor([[False, True, True, False], [False, True, True, True]])
    assert commonest(torch.tensor([[5, 3, 2, 5], [5, 5, 3, 3]]), fires) == (3, pytest.approx(3 / 5))


def test_the_token_alone_names_the_passages_of_a_latent_that_is_its_token():
    text, acts = some_text()
    text.prompts[:] = torch.randint(0, 50, (60, 65))
    text.prompts[acts > 0] = 55
    _, passages = drawn(text, acts)
    row = told_by_token(text, acts > 0, passages)
    assert row["token_fires"] == [n for n, passage in enumerate(passages, start=1) if passage.band]
    assert (row["token_precision"], row["token_accuracy"], row["commonest_share"]) == (1, 1, 1)
    assert row["commonest_token"] == "55 "
    text.prompts[30:][acts[30:] > 0] = 3  # the second half is another text
    row = told_by_token(text, acts > 0, passages)
    assert (row["token_fires"], row["token_accuracy"]) == ([], 0.5)
    assert row["token_precision"] < 0.5


def test_from_saes_to_the_page_and_back(sae, tmp_path, capsys):
    sae.save_model(tmp_path / "sae")
    out = tmp_path / "out"
    folder = str(tmp_path / "sae")
    options = ["--latents", "2", "--tokens", "8192", "--out", str(out)]
    script.main(["--saes", f"one={folder}", f"two={folder}", *options])
    printed = capsys.readouterr().out
    assert "| one | 2 |" in printed
    assert "average precision of the token alone" in printed
    rows = json.loads((out / "latents.json").read_text())
    assert sorted(row["sae"] for row in rows) == ["one", "one", "two", "two"]
    assert all(row["completeness_error"] < 0.01 and 0 < row["own_share"] <= 1 for row in rows)
    assert all(row["density"] < row["token_precision"] <= 1 for row in rows)  # the precision of a guess
    answers = [f"{row['id']},4,{' '.join(map(str, row['fires']))}" for row in rows]
    for name, lines in {"right": answers, "partly": answers[:1]}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,rating,fires", *lines]) + "\n")
    script.main(["--out", str(out), "--score", str(tmp_path / "right.csv"), str(tmp_path / "partly.csv")])
    printed = capsys.readouterr().out
    assert "| one | right | 2 | 4.00 [4.00, 4.00] | 100% | 2 | 1.00 [1.00, 1.00] |" in printed
    assert f"| {rows[0]['sae']} | partly | 1 | 4.00 | 100% | 1 | 1.00 |" in printed
    assert "Latents rated by both right and partly: 1; the same rating: 100.0%" in printed


def test_an_sae_without_such_latents_is_refused(sae, tmp_path):
    sae.save_model(tmp_path / "sae")
    options = ["--latents", "2", "--tokens", "512", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"SAE 'one': no latent .* use more text"):
        script.main(["--saes", f"one={tmp_path / 'sae'}", *options])


def test_saes_at_other_places_than_one_blocks_output_are_refused():
    script.check_place("a", "blocks.2.hook_resid_post", "blocks.2.hook_resid_post")
    for hook, first in [("blocks.2.hook_mlp_out",) * 2, ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")]:
        with pytest.raises(SystemExit, match=rf"^SAE 'a' is on {hook}, and the first on {first}; all must be on the"):
            script.check_place("a", hook, first)


def test_a_text_that_would_be_read_twice_is_refused(sae, tmp_path):
    sae.save_model(tmp_path / "sae")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} words " * 90}) + "\n" for n in range(3)))
    options = ["--text", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"text.jsonl has fewer tokens than --tokens 32768, so its beginning would be"):
        script.main(["--saes", f"one={tmp_path / 'sae'}", *options])
