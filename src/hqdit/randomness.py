"""Named random streams: what is drawn depends on the seed and the stream's name, never on order or batch size.

Free to every floor, as `errors` and `progress` are.
"""

from __future__ import annotations

import hashlib

import numpy as np


def random_stream(seed: int, name: str) -> np.random.Generator:
    """A Philox generator keyed by `seed` and `name`; different names give disjoint streams for one seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
