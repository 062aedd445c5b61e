"""Every conformance check of steering passes on a sound steerer and catches one that breaks just what it checks."""

import pytest
import torch

from corollary.adapt import GACT, SteeringHandle
from corollary.testing import Case, check_steering
from corollary.testing.steering import CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_steerer_passes(name):
    CHECKS[name](Case(GACT, {"options": ({}, {"clusters": 1, "pool": "mean"})}))


class Broken(GACT):
    """Lets a subclass change what a position gets."""

    def changed(self, h, moved):
        return moved

    def _mover(self, index, name, strength):
        mover = super()._mover(index, name, strength)

        def hook(module, args, out):
            moved = mover(module, args, out)
            if isinstance(out, torch.Tensor):
                return self.changed(out, moved)
            return self.changed(out[0], moved[0]), *moved[1:]

        return hook


class DoesNothing(Broken):
    def changed(self, h, moved):
        return h


class IgnoresStrength(GACT):
    def steer(self, strength=1.0, layers=None):
        return super().steer(1.0, layers)


class StaysOn(GACT):
    def steer(self, strength=1.0, layers=None):
        super().steer(strength, layers)
        return SteeringHandle([])


class WritesWeights(GACT):
    def steer(self, strength=1.0, layers=None):
        with torch.no_grad():
            next(self.model.parameters()).add_(1.0)
        return super().steer(strength, layers)


class FitLeavesHooks(GACT):
    def fit(self, source, target):
        self.model.norm.register_forward_hook(lambda *_: None)
        return super().fit(source, target)


class OneAtATime(GACT):
    def steer(self, strength=1.0, layers=None):
        for module in self.layers.values():
            module._forward_hooks.clear()
        return super().steer(strength, layers)


class DropsTuples(GACT):
    def _mover(self, index, name, strength):
        mover = super()._mover(index, name, strength)

        def hook(module, args, out):
            moved = mover(module, args, out)
            return moved if isinstance(out, torch.Tensor) else (moved[0], "lost")

        return hook


class LooksAhead(Broken):
    def changed(self, h, moved):
        return h + (moved - h).mean(1, keepdim=True)


class Detaches(Broken):
    def changed(self, h, moved):
        return moved.detach()


class Widens(Broken):
    def changed(self, h, moved):
        return moved.double()


class LosesProbes(GACT):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._state["weight"] = torch.randn(self._state["weight"].shape, generator=torch.Generator().manual_seed(0))


class DrawsNumbers(GACT):
    def fit(self, source, target):
        torch.rand(1)
        return super().fit(source, target)


class TakesNan(GACT):
    def steer(self, strength=1.0, layers=None):
        return super().steer(0.0 if strength != strength else strength, layers)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("acts", DoesNothing),
        ("acts", IgnoresStrength),
        ("removal", StaysOn),
        ("removal", WritesWeights),
        ("removal", FitLeavesHooks),
        ("several", OneAtATime),
        ("tuples", DropsTuples),
        ("causal", LooksAhead),
        ("modes", Detaches),
        ("dtypes", Widens),
        ("dtypes", DoesNothing),
        ("resumed", LosesProbes),
        ("determinism", DrawsNumbers),
        ("bad_input", TakesNan),
    ],
)
def test_a_broken_steerer_is_caught(name, kind):
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[name](Case(kind))


def test_check_steering_names_the_check():
    with pytest.raises(AssertionError, match="check 'acts' failed"):
        check_steering(DoesNothing)
