"""Expected values for the tests of crates/evaluation, from scikit-learn and SciPy on random labels and scores.

    pip install scikit-learn scipy numpy
    python benches/peer/evaluation/expected.py > crates/evaluation/src/expected.json
"""

import json

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

rng = np.random.default_rng(3)


def clustering():
    # More clusters than classes, fewer, as many; nearly right and random; a single cluster; all samples single.
    for samples, clusters, classes, agree in [
        (40, 5, 5, 0.8), (40, 5, 5, 0.0), (37, 9, 4, 0.6), (37, 3, 8, 0.7), (60, 12, 12, 0.5), (25, 2, 2, 0.9),
        (25, 2, 7, 0.3), (50, 20, 3, 0.5), (30, 1, 4, 0.0), (30, 4, 1, 0.0), (90, 10, 10, 0.95),
    ]:
        truth = rng.integers(0, classes, samples)
        found = np.where(rng.random(samples) < agree, truth % clusters, rng.integers(0, clusters, samples))
        yield found, truth
    yield np.arange(11), rng.integers(0, 3, 11)


def agreement(found, truth):
    table = contingency_matrix(truth, found)
    rows, columns = linear_sum_assignment(-table)
    return {
        "clusters": found.tolist(),
        "classes": truth.tolist(),
        "nmi": normalized_mutual_info_score(truth, found),
        "ari": adjusted_rand_score(truth, found),
        "accuracy": 100.0 * table[rows, columns].sum() / len(truth),
    }


def ranking(samples, relevant):
    scores = np.round(rng.normal(size=samples), 4)
    truth = np.zeros(samples, dtype=int)
    truth[rng.choice(samples, relevant, replace=False)] = 1
    return {
        "scores": scores.tolist(),
        "relevant": truth.tolist(),
        "average_precision": average_precision_score(truth, scores),
    }


print(json.dumps({
    "clustering": [agreement(*case) for case in clustering()],
    "ranking": [ranking(*case) for case in [(10, 1), (25, 7), (40, 39), (60, 20), (33, 33)]],
}))
