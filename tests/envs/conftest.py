"""Suites' environments for every file here that asks for them."""

from tests.envs.suite_cases import made

__all__ = ["made"]
