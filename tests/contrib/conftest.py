"""The tiny bases of tests/models."""

from tests.models.conftest import model, models

__all__ = ["model", "models"]
