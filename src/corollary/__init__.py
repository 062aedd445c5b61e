"""Corollary: papers you can run.

Import components from their packages, e.g. ``from corollary.optim import AdaHessian``. This file imports nothing, so that
the command line answers before torch is loaded.
"""

__version__ = "0.1.0"
