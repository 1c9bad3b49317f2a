"""Limits of a method's settings: what is outside of them, or no number, is refused by name."""

from collections.abc import Callable
from typing import Any


def check_positive(settings: Any, *names: str) -> None:
    _check(settings, names, lambda value: value > 0, "above 0")


def check_not_negative(settings: Any, *names: str) -> None:
    _check(settings, names, lambda value: value >= 0, "at least 0")


def check_share(settings: Any, *names: str) -> None:
    _check(settings, names, lambda value: 0 <= value <= 1, "from 0 to 1")


def check_below_one(settings: Any, *names: str) -> None:
    _check(settings, names, lambda value: 0 <= value < 1, "at least 0 and below 1")


def _check(settings: Any, names: tuple[str, ...], fits: Callable[[float], bool], limits: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not fits(value):
            raise ValueError(f"{name} is {value}; it must be {limits}")
