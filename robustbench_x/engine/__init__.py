"""The engine: runs a plan batch by batch, stores rows as they come, resumes, and assembles the report."""

from robustbench_x.engine.progress import Progress, Silent
from robustbench_x.engine.run import run_audit

__all__ = ["Progress", "Silent", "run_audit"]
