"""Runs a schedule for real: weights streamed through a budgeted device, attention on the CPU."""

from executor.checkpoint import Checkpoint, make_checkpoint
from executor.engine import Executor
from executor.generate import generate
from executor.results import GenerationResult

__all__ = ["Checkpoint", "Executor", "GenerationResult", "generate", "make_checkpoint"]
