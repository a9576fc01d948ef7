"""Fixtures that several folders of unit tests share."""

import logging
from collections.abc import Iterator

import pytest

from megatron_tikmix.log import PACKAGE
from tests.one_rank import trained

__all__ = ["trained"]


@pytest.fixture(autouse=True)
def unconfigured_logging() -> Iterator[None]:
    """A command configures logging for its whole process, which here is that of all tests."""
    yield
    logging.captureWarnings(False)
    for name in (PACKAGE, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
