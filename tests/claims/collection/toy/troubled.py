"""Measurements that go wrong."""

from corollary.claims import Exact, Paired, Trial, claim


@claim(control={})
def raises(trial: Trial) -> Paired:
    raise RuntimeError("the component broke\non two lines")


@claim(control={})
def gives_nan(trial: Trial) -> Paired:
    return Paired(ours=float("nan"), baseline=1.0)


@claim(control={})
def exact_nan(trial: Trial) -> Exact:
    return Exact(float("nan"))


@claim(control={})
def wrong_kind(trial: Trial) -> Exact:
    return Exact(0.0)


@claim(control={})
def gives_none(trial: Trial) -> Paired:
    return None


@claim(control={})
def control_passes(trial: Trial) -> Exact:
    return Exact(0.0)


def _broken(trial: Trial) -> Exact:
    raise ValueError("the control broke")


@claim(control=_broken)
def control_raises(trial: Trial) -> Exact:
    return Exact(0.0)


@claim(control={})
def worse(trial: Trial) -> Paired:
    return Paired(ours=2.0 + trial.rng.uniform(0, 0.1), baseline=1.0)


@claim(control={})
def unclear(trial: Trial) -> Paired:
    return Paired(ours=1.0 if trial.seed % 2 else -1.0 + 1e-3 * trial.rng.normal(), baseline=0.0)
