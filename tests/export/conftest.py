"""The tiny bases of the models room, and tuned weights of them."""

from tests.models.conftest import model, models

__all__ = ["model", "models"]
