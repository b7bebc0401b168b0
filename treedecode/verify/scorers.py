"""temp"""

import numpy as np


def as_scorer(x):
    if x is None or hasattr(x, "num_samples"):
        return x

    async def score(f, p):
        return np.array([x(p, t) for t in f.texts()])

    return score
