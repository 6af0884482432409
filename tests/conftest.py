"""Fixtures for all tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Halves the time XLA takes to compile tiny models, which is most of such a test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
