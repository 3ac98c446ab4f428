"""Slow, obviously right losses: a dense mask, a loop over tokens, ATS with Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from triewise.tokens import Trie
from triewise.training import Apao, Bear


def dense_trie_nll(logits: Tensor, target: Tensor, node: Tensor, trie: Trie, temperature: float) -> Tensor:
    """Masked softmax with a (M, V) mask, as the authors write it, but with log_softmax."""
    valid = torch.zeros(logits.shape, dtype=torch.bool)
    for row, n in enumerate(node.tolist()):
        tokens, _ = trie.children(n)
        valid[row, tokens.tolist()] = True
    masked = (logits / temperature).masked_fill(~valid, -torch.inf)
    return -masked.log_softmax(-1).gather(1, target[:, None])[:, 0]


def expanded_nll(logits: Tensor, target: Tensor, node: Tensor, trie: Trie, temperature: float) -> Tensor:
    """MSL + alpha as it is written: the sum over the other valid tokens times |V| / |valid|, in float64."""
    losses = []
    for z, y, n in zip((logits.double() / temperature).exp(), target.tolist(), node.tolist(), strict=True):
        valid = trie.children(n)[0].tolist()
        others = sum(z[v] for v in valid if v != y)
        losses.append(-torch.log(z[y] / (z[y] + len(z) / len(valid) * others)))
    return torch.stack(losses)


def dense_lml_parts(logits: Tensor, target: Tensor, node: Tensor, trie: Trie) -> tuple[Tensor, Tensor]:
    """Both parts of the language-modelling loss from probabilities in float64."""
    invalid, choice = [], []
    for p, y, n in zip(logits.double().softmax(-1), target.tolist(), node.tolist(), strict=True):
        mass = p[trie.children(n)[0].tolist()].sum()
        invalid.append(-mass.log())
        choice.append(-(p[y] / mass).log())
    return torch.stack(invalid), torch.stack(choice)


def weighted_mean(losses: list[float], weights: list[float], decisions: list[bool], normaliser: str) -> float:
    """Sum of weighted losses over the normaliser, one token at a time."""
    total = divisor = 0.0
    for loss, weight, decision in zip(losses, weights, decisions, strict=True):
        total += loss * weight
        divisor += weight if normaliser == "weights" or decision else 0.0
    return total if normaliser == "sum" else total / divisor


def plain_ats(
    stream: list[tuple[list[float], list[float], int]],
    eta: float,
    initial: float,
    momentum: float,
    clamp: tuple[float, float],
    root: str,
) -> list[float]:
    """Temperatures after each (target logits, valid logits, number of valid tokens)."""
    tau, taus = initial, []
    for positive, valid, m in stream:
        mean = sum(valid) / len(valid)
        variance = sum((v - mean) ** 2 for v in valid) / (len(valid) - 1)
        d = sum(positive) / len(positive) - mean
        c = math.log(m * eta)
        discriminant = max(d**2 - 2 * c * variance, 0.0)
        sign = 1 if root == "plus" else -1
        star = (d + sign * discriminant**0.5) / (2 * c)
        star = clamp[0] if star < clamp[0] else clamp[1] if star > clamp[1] else star
        tau = momentum * tau + (1 - momentum) * star
        taus.append(tau)
    return taus


def plain_token_ats(
    positive: float, valid: list[float], eta: float, clamp: tuple[float, float], root: str
) -> float:
    """Eq. 11 for one token, with so many digits that a C of 1e-40 stands for its limit 0."""
    with localcontext() as context:
        context.prec = 200
        values = [Decimal(v) for v in valid]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        d = Decimal(positive) - mean
        c = max((len(values) * Decimal(eta)).ln(), Decimal("1e-40"))
        spread = max(d**2 - 2 * c * variance, Decimal(0)).sqrt()
        star = (d + (1 if root == "plus" else -1) * spread) / (2 * c)
        return float(min(max(star, Decimal(clamp[0])), Decimal(clamp[1])))


def mean_probability(rows: list[tuple[float, list[float]]], tau: float) -> float:
    """Mean of P(target) over rows of (target's logit, logits of its valid tokens)."""
    each = [1 / sum(math.exp((v - positive) / tau) for v in valid) for positive, valid in rows]
    return sum(each) / len(each)


def plain_exact_ats(rows: list[tuple[float, list[float]]], eta: float, clamp: tuple[float, float]) -> float:
    """Bisection of the mean probability in the clamp, or its nearer end."""
    low, high = clamp
    at_low, at_high = (mean_probability(rows, tau) - eta for tau in clamp)
    if (at_low > 0) == (at_high > 0):
        return low if abs(at_low) <= abs(at_high) else high
    for _ in range(60):
        middle = (low + high) / 2
        if (mean_probability(rows, middle) > eta) == (at_low > 0):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def plain_cft(
    with_history: Tensor, without: Tensor, target: Tensor, weight: list[float], strength: float
) -> Tensor:
    """CFT of one batch as its authors write it: probabilities of f and of f - f0, token by token, in float64."""
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for f, f_0, y, w in zip(with_history.double(), without.double(), target.tolist(), weight, strict=True):
        first, second = f.exp() / f.exp().sum(), (f - f_0).exp() / (f - f_0).exp().sum()
        total = total - w * first[y].log() - strength * w * second[y].log()
        weights += w
    return total / weights


def plain_sdpo(
    theta_chosen: Tensor, ref_chosen: Tensor, theta_rejected: Tensor, ref_rejected: Tensor, beta: float
) -> list[Tensor]:
    """-log sigmoid(-log sum exp) row by row and one rejected title after the other, in float64."""
    losses = []
    for row in range(len(theta_chosen)):
        s_w = theta_chosen[row].double() - ref_chosen[row].double()
        total = torch.zeros((), dtype=torch.float64)
        for d in range(theta_rejected.shape[1]):
            s_d = theta_rejected[row, d].double() - ref_rejected[row, d].double()
            total = total + torch.exp(beta * (s_d - s_w))
        losses.append(-torch.log(1 / (1 + torch.exp(torch.log(total)))))
    return losses


def plain_bear(
    logits: Tensor, target: Tensor, node: Tensor, trie: Trie, weight: Tensor, bear: Bear
) -> Tensor:
    """BEAR as it is written, token by token, in float64; `coded` with the weights of all decisions scaled together."""
    losses, weights, base = [], [], []
    for z, y, n, w in zip(logits.double(), target.tolist(), node.tolist(), weight.double(), strict=True):
        valid = trie.children(n)[0].tolist()
        p = (z[valid] / bear.objective.tau).softmax(0)
        nll, best = -p[valid.index(y)].log(), sorted(p, reverse=True)
        q = best[min(bear.width, len(valid)) - 1]
        margin = (-nll - q.log()) / bear.xi
        if bear.form == "described":
            added = torch.sigmoid(-margin) if len(valid) >= bear.width else 0.0
            losses.append(w * (bear.objective.tau * nll + bear.strength * added))
        else:
            losses.append(w * bear.objective.tau * nll)
            weights.append(1 + bear.strength * torch.sigmoid(margin.detach()))
            base.append(w if len(valid) > 1 else torch.zeros_like(w))
    if bear.form == "described":
        return torch.stack(losses)
    after = sum(w * b for w, b in zip(weights, base, strict=True))
    return torch.stack([loss * w * sum(base) / after for loss, w in zip(losses, weights, strict=True)])


def plain_apao(nll: list[list[Tensor]], size: list[float], apao: Apao) -> Tensor:
    """Pointwise APAO of titles of any length from the nll of their tokens, depth by depth."""
    levels = apao.levels or 10**6
    loss = [
        [sum(title[:t]) / (t * apao.temperature) for t in range(1, min(len(title) - 1, levels) + 1)]
        for title in nll
    ]
    weight = []
    for t in range(max(map(len, loss))):
        there = [float(title[t].detach()) for title in loss if len(title) > t]
        mean = sum(there) / len(there)
        weight.append(mean * math.exp(apao.eta * mean))
    total = torch.zeros((), dtype=torch.float64)
    for title, n in zip(loss, size, strict=True):
        if title:
            w = weight[: len(title)]
            total = total + n * sum(a * b for a, b in zip(w, title, strict=True)) / sum(w)
    return apao.strength * total


def all_prefixes(trie: Trie, step: Callable[[int], Tensor], path: list[int], depth: int) -> Tensor:
    """-1/t log softmax of the sum of ln P along a path of nodes, against all beginnings with as many decisions.

    ``step(n)`` gives ln P of the children of node n; a title that ends before counts as a beginning.
    """
    open_, done, ours = [(0, torch.zeros((), dtype=torch.float64), 0)], [], None
    while open_:
        n, total, taken = open_.pop()
        children = trie.children(n)[1].tolist()
        if not children or taken == depth:
            done.append(total)
            ours = total if n in path and taken == depth and ours is None else ours
            continue
        log_p = step(n)
        for child, value in zip(children, log_p, strict=True):
            open_.append((child, total + value, taken + (len(children) > 1)))
    assert ours is not None
    return -(ours - torch.stack(done).logsumexp(0)) / depth
