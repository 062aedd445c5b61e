"""Every conformance check of continual learners passes on sound ones and catches one that breaks just what it checks."""

import pytest
import torch

from corollary.adapt import CUBER, EWC, GPM
from corollary.testing import Case, check_continual
from corollary.testing.continual import CHECKS


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", [GPM, CUBER, EWC])
def test_sound_learners_pass(name, kind):
    CHECKS[name](Case(kind, {"options": ({"strength": 5.0},) if kind is EWC else ({}, {"project": "update"})}))


class ActsAtOnce(GPM):
    def _before_step(self):
        super()._before_step()
        for p in self.model.parameters():
            p.grad.mul_(0.5)


class Forgets(GPM):
    def protected(self, name):
        return self.bases[name][:, :0]


class LearnsNothing(GPM):
    def protected(self, name):
        return torch.eye(len(self.bases[name]), dtype=self.bases[name].dtype)


class StaysOn(GPM):
    def remove(self):
        self._handles = []


class LeavesHooks(GPM):
    def end_task(self, loss):
        super().end_task(loss)
        self.model[0].register_forward_hook(lambda *_: None)


class AttachesTwice(EWC):
    def attach(self, optimizer):
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        return self


class KeepsTasksElsewhere(GPM):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.num_tasks = 0


class CountsWrong(GPM):
    def memory_bytes(self):
        return super().memory_bytes() + 8


class Widens(GPM):
    def _after_step(self):
        self.model.double()


class DrawsNumbers(GPM):
    def end_task(self, loss):
        torch.rand(1)
        super().end_task(loss)


class MovesParameters(GPM):
    @torch.no_grad()
    def begin_task(self, loss):
        next(self.model.parameters()).add_(1e-3)


class CallsBackward(GPM):
    def begin_task(self, loss):
        with torch.enable_grad():
            loss().sum().backward()


class TakesAnyLoss(GPM):
    def _losses(self, loss):
        try:
            return loss()
        except RuntimeError:
            raise
        except Exception:  # noqa: BLE001 - the point is that nothing is refused
            return torch.ones(1)


class LeavesHooksOnError(GPM):
    def end_task(self, loss):
        handle = self.model[0].register_forward_pre_hook(lambda *_: None)
        super().end_task(loss)
        handle.remove()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("first_task", ActsAtOnce),
        ("remembers", Forgets),
        ("remembers", LearnsNothing),
        ("removal", StaysOn),
        ("removal", LeavesHooks),
        ("reattached", AttachesTwice),
        ("resumed", KeepsTasksElsewhere),
        ("memory", CountsWrong),
        ("dtypes", Widens),
        ("side_effects", DrawsNumbers),
        ("side_effects", MovesParameters),
        ("side_effects", CallsBackward),
        ("bad_input", TakesAnyLoss),
        ("bad_input", LeavesHooksOnError),
    ],
)
def test_a_broken_learner_is_caught(name, kind):
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[name](Case(kind))


def test_check_continual_names_the_check():
    with pytest.raises(AssertionError, match="check 'memory' failed"):
        check_continual(CountsWrong)
