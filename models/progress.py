"""From the steps of one stage after another to the progress of the whole job."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a stage yields: how far it is, and figures worth showing."""

    done: int
    total: int
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a grouping is; `fraction` never falls."""

    stage: str  # one of those of `models.train.expected_cost_s`
    done: int  # within the stage
    total: int
    fraction: float  # of the whole job, 0 to 1, by expected cost
    details: dict[str, float]


def finish(steps: Generator[Any, None, Result]) -> Result:
    """Drive a generator to its end; returns what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


class Clock:
    """Times the stages, and weighs their steps by the seconds that each stage is expected to take."""

    def __init__(self, expected_s: dict[str, float]) -> None:
        self.expected_s = expected_s
        self.seconds: dict[str, float] = {}
        self.reached = 0.0

    def follow(
        self, stage: str, steps: Generator[Step, None, Result], *, ready: bool = False
    ) -> Generator[Progress, None, Result]:
        """Pass on the steps of a stage as progress of the whole; returns what the stage returns.

        With `ready` what the first step has done lay there already, and costs nothing.
        """
        started, first = time.monotonic(), 0
        try:
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    self.seconds[stage] = round(time.monotonic() - started, 3)
                    result: Result = end.value
                    return result
                if ready:
                    ready, first = False, step.done
                    self.expected_s[stage] *= 1 - step.done / max(step.total, 1)
                yield self.progress(stage, step, first)
        finally:
            steps.close()

    def progress(self, stage: str, step: Step, first: int = 0) -> Progress:
        past_s = sum(self.expected_s[name] for name in self.seconds)
        now_s = self.expected_s[stage] * (step.done - first) / max(step.total - first, 1)
        fraction = (past_s + now_s) / sum(self.expected_s.values())
        self.reached = max(self.reached, min(fraction, 1.0))
        return Progress(stage=stage, done=step.done, total=step.total, fraction=self.reached, details=step.details)
