"""The tolerances of the tests, with their reasons.

To the bit where code path, shapes, memory layout and process are the same. Anywhere else a kernel may sum in another
order: it is chosen by the processor, the shape of a batch, the strides of a tensor and the address of a weight. There a
tolerance stands, with its reason.
"""

from __future__ import annotations

import numpy as np

# Images of two or three sampling steps by two pipelines with the same weights, values in [0, 1]. Random weights carry
# one rounding (6e-8) through some hundred layers: 3e-6 was seen. Other weights move them by more than 1e-3.
PICTURE = 1e-4


def assert_same_picture(found: np.ndarray, expected: np.ndarray) -> None:
    """The images of two pipelines that were built apart from the same weights."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=PICTURE)
