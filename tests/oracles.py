"""The paper's definitions and our own rules in plain loops over Python numbers; imports nothing from the package."""

import math

Matrix = list[list[float]]  # one list per token


def score(name: str, column: list[float], last_cutoff: float = math.inf) -> float:
    total, n_tokens = sum(column), len(column)
    entropy = -sum(a / total * math.log(a / total) for a in column if a > 0) if total > 0 else 0.0
    if name == "l2_norm":
        return math.sqrt(sum(a * a for a in column))
    if name == "squared_l2":
        return sum(a * a for a in column)
    if name == "entropy":
        return 1 - entropy / math.log(n_tokens) if n_tokens > 1 and total > 0 else 0.0
    if name == "perplexity":
        return math.exp(entropy) if total > 0 else 0.0
    if name == "frequency":
        return float(sum(a > 0 for a in column))
    if name == "winsorised":
        return sum(min(a, last_cutoff) ** 2 for a in column)
    if name == "uniform":
        return float(total > 0)
    raise KeyError(name)


def hash32(x: int) -> int:
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x21F0AAAD & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x735A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def gumbel(seed: int, draw: int, group: int, latent: int) -> float:
    bits = hash32(hash32(hash32(hash32(seed) ^ draw) ^ group) ^ latent)
    return -math.log(-math.log((bits + 0.5) / 2**32))


def pool(
    acts: Matrix,
    name: str,
    size: int,
    draw: tuple[int, int, int] | None = None,
    last_cutoff: float = math.inf,
) -> set[int]:
    """The `size` best latents in one group of tokens; `draw` is (seed, draw, group) if the pool is sampled."""
    ranked = []
    for latent in range(len(acts[0])):
        column = [row[latent] for row in acts]
        alive = max(column) > 0
        value = score(name, column, last_cutoff)
        if draw is not None:
            value = math.log(value + 2.0**-126) + gumbel(*draw, latent)
        norm = math.sqrt(sum(a * a for a in column))
        ranked.append((not alive, -value, -norm, latent) if alive else (True, 0.0, 0.0, latent))
    return {latent for *_, latent in sorted(ranked)[:size]}


def pools(
    acts: Matrix, name: str, size: int, group_size: int | None, draw: tuple[int, int] | None = None
) -> list[set[int]]:
    step = group_size or len(acts)
    groups = [acts[start : start + step] for start in range(0, len(acts), step)]
    return [pool(group, name, size, None if draw is None else (*draw, i)) for i, group in enumerate(groups)]


def kept_values(acts: Matrix, pools: list[set[int]], n_keep: int, group_size: int | None) -> list[float]:
    """Positive values among the `n_keep` largest pooled entries of the batch, ascending."""
    step = group_size or len(acts)
    entries = [row[latent] for token, row in enumerate(acts) for latent in pools[token // step]]
    return sorted(value for value in sorted(entries, reverse=True)[:n_keep] if value > 0)


def gini(counts: list[float]) -> float:
    """Mean absolute difference over all pairs, divided by twice the mean."""
    n, mean = len(counts), sum(counts) / len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * n * mean)


def quantile_threshold(column: list[float], count: int) -> float:
    """Halfway between the `count`-th largest entry and the next, with negative entries counted as 0."""
    if count == 0:
        return math.inf
    ordered = sorted((max(value, 0.0) for value in column), reverse=True)
    return (ordered[count - 1] + (ordered[count] if count < len(ordered) else 0.0)) / 2


def precision_weighted_counts(columns: Matrix, kept: Matrix) -> list[int]:
    """Number of entries that may fire per latent: its selections times its precision, scaled to the same total.

    `columns` and `kept` have one list per latent. Rounded by largest remainder; at most a latent's positive entries.
    """
    counts = [sum(value > 0 for value in column) for column in kept]
    hits = []
    for column, chosen, count in zip(columns, kept, counts, strict=True):
        above = quantile_threshold(column, count)
        hits.append(max(1, sum(value > above for value in chosen)) if count else 0)
    room = [sum(value > 0 for value in column) if hit else 0 for column, hit in zip(columns, hits, strict=True)]
    # Cap the latents that reach their limit, and share the rest among the others.
    full: set[int] = set()
    while True:
        left = sum(counts) - sum(room[i] for i in full)
        factor = left / max(sum(hit for i, hit in enumerate(hits) if i not in full), 1)
        more = {i for i, hit in enumerate(hits) if i not in full and hit and hit * factor >= room[i]}
        if not more:
            break
        full |= more
    wanted = [room[i] if i in full else hit * factor for i, hit in enumerate(hits)]
    result = [math.floor(value + 1e-9) for value in wanted]
    order = sorted(range(len(wanted)), key=lambda i: result[i] - wanted[i])
    for i in order[: sum(counts) - sum(result)]:
        result[i] += 1
    return result


def kept_places(acts: Matrix, pools: list[set[int]], n_keep: int, group_size: int | None) -> list[tuple[int, int]]:
    """(token, latent) of the positive entries among the `n_keep` largest pooled ones; ties go to the lowest pair."""
    step = group_size or len(acts)
    ranked = [(-row[latent], token, latent) for token, row in enumerate(acts) for latent in pools[token // step]]
    return sorted((token, latent) for value, token, latent in sorted(ranked)[:n_keep] if value < 0)
