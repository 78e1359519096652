"""Rules that other tools allocate bits by, written from their descriptions: what ours must never be worse than."""

import heapq

import numpy as np


def one_step_greedy(objective, cost, budget):
    """Start at the cheapest options; always buy the next wider option with the best gain per cost.

    A step that gains nothing, or does not fit, takes its layer out of the race for good.
    """
    order = np.argsort(cost, axis=1, kind="stable")
    at = np.zeros(len(cost), dtype=int)
    used = cost[np.arange(len(cost)), order[:, 0]].sum()
    heap = []

    def offer(layer):
        if at[layer] + 1 < cost.shape[1]:
            now, then = order[layer, at[layer]], order[layer, at[layer] + 1]
            gain, price = objective[layer, now] - objective[layer, then], cost[layer, then] - cost[layer, now]
            if gain > 0:
                heapq.heappush(heap, (-gain / max(price, 1e-300), layer, price))

    for layer in range(len(cost)):
        offer(layer)
    while heap:
        _, layer, price = heapq.heappop(heap)
        if used + price <= budget:
            used += price
            at[layer] += 1
            offer(layer)
    return order[np.arange(len(cost)), at]


def threshold_bisection(objective, cost, budget, rounds=100):
    """The smallest common limit on the score whose plan fits: every layer takes its cheapest option below it."""
    order = np.argsort(cost, axis=1, kind="stable")
    low, high, best = objective.min(), objective.max(), None
    for _ in range(rounds):
        limit = (low + high) / 2
        below = np.take_along_axis(objective, order, 1) <= limit
        choice = np.take_along_axis(order, np.where(below.any(1), below.argmax(1), 0)[:, None], 1)[:, 0]
        if cost[np.arange(len(cost)), choice].sum() <= budget:
            best, high = choice, limit
        else:
            low = limit
    return best


def beam_dynamic_program(objective, cost, budget, states=1000):
    """Cumulative costs with their least score, thinned evenly to so many states after every layer."""
    used, score, plans = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=int)
    for layer in range(len(cost)):
        next_used = (used[:, None] + cost[layer]).ravel()
        next_score = (score[:, None] + objective[layer]).ravel()
        options = np.tile(np.arange(cost.shape[1]), len(used))
        parents = np.repeat(np.arange(len(used)), cost.shape[1])
        sort = np.lexsort((next_score, next_used))
        sort = sort[next_used[sort] <= budget]
        if not len(sort):
            return None
        better = next_score[sort] < np.concatenate([[np.inf], np.minimum.accumulate(next_score[sort])[:-1]])
        kept = sort[better]
        if len(kept) > states:
            kept = kept[np.linspace(0, len(kept) - 1, states).round().astype(int)]
        used, score = next_used[kept], next_score[kept]
        plans = np.column_stack([plans[parents[kept]], options[kept]])
    return plans[score.argmin()]


def sorted_prefix(objective, cost, budget):
    """Two widths: the least sensitive layers take the narrow one, in order, until the plan fits."""
    wide, narrow = cost.argmax(1), cost.argmin(1)
    rows, choice = np.arange(len(cost)), wide.copy()
    for layer in np.argsort(objective[rows, narrow], kind="stable"):
        if cost[rows, choice].sum() <= budget:
            break
        choice[layer] = narrow[layer]
    return choice


RULES = (one_step_greedy, threshold_bisection, beam_dynamic_program, sorted_prefix)
