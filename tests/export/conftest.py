"""The tiny bases of tests/models, and tuned weights of them."""

from tests.models.conftest import model, models

__all__ = ["model", "models"]
