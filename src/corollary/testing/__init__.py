"""Public conformance checks, one module for each kind of component.

``check_<kind>`` runs every check of its kind on a factory; the test suite runs them over every registered component.
"""

from corollary.testing.adapter import check_adapter
from corollary.testing.case import Case, Check, checks, iterate_checks, run_checks
from corollary.testing.compressor import check_compressor
from corollary.testing.continual import check_continual
from corollary.testing.diagnostic import check_diagnostic
from corollary.testing.estimator import check_estimator
from corollary.testing.function import check_function
from corollary.testing.layer import check_layer
from corollary.testing.loss import check_loss
from corollary.testing.manifold import check_manifold
from corollary.testing.optimizer import Problem, check_optimizer
from corollary.testing.sampler import check_sampler
from corollary.testing.schedule import check_schedule
from corollary.testing.steering import check_steering

__all__ = [
    "Case",
    "Check",
    "checks",
    "iterate_checks",
    "run_checks",
    "check_adapter",
    "check_compressor",
    "check_continual",
    "check_diagnostic",
    "check_estimator",
    "check_function",
    "check_layer",
    "check_loss",
    "check_manifold",
    "check_optimizer",
    "check_sampler",
    "check_schedule",
    "check_steering",
    "Problem",
]
