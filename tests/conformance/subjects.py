"""Every system under test."""

from __future__ import annotations

from tests.conformance.cpu import Cpu
from tests.conformance.executor import Executor
from tests.conformance.optimizer import Optimizer
from tests.conformance.runner import Subject

SUBJECTS: dict[str, Subject] = {
    subject.name: subject for subject in (Optimizer(), Executor(), Cpu())
}
