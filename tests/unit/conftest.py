"""Fixtures that several folders of unit tests share."""

from tests.one_rank import trained

__all__ = ["trained"]
