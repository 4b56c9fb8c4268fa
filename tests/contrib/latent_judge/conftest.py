"""The contexts of tests/sources."""

from tests.sources.conftest import make_context

__all__ = ["make_context"]
