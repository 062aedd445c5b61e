"""The adapters' conformance checks: an adapter that is right passes, and each check fails on one broken for it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from corollary.adapt import LoRA
from corollary.adapt.lora import LoRAAdapter
from corollary.testing import Case, check_adapter
from corollary.testing.adapter import CHECKS

TAGS = {
    "kinds": ("linear",),
    "oracle": lambda weight, state, config: state["lora_B"] @ state["lora_A"],
    "parameters": lambda site: 2 * (site.in_features + site.out_features),
}


def broken(**methods):
    """A LoRA whose adapter has some methods replaced."""
    kind = type("Broken", (LoRAAdapter,), methods)

    @dataclass(frozen=True)
    class BrokenLoRA(LoRA):
        def build(self, site, weight, extra=None):
            return kind(site, weight, self.rank, self.scaling)

    return lambda: BrokenLoRA(rank=2)


def fails(name, make, **tags):
    with pytest.raises(AssertionError):
        CHECKS[name](Case(make, {**TAGS, **tags}))


def test_lora_passes():
    check_adapter(lambda: LoRA(rank=2), **TAGS)


def test_wrong_oracle_count_and_start():
    fails("oracle", lambda: LoRA(rank=2), oracle=lambda w, s, c: 1.001 * s["lora_B"] @ s["lora_A"])
    fails("trainable_count", lambda: LoRA(rank=2), parameters=lambda site: 1)

    def start(self, site, weight, rank, scaling):
        LoRAAdapter.__init__(self, site, weight, rank, scaling)
        nn.init.ones_(self.lora_B)

    fails("identity_at_start", broken(__init__=start))


def test_forward_apart_from_delta():
    def forward(self, x, out):
        return LoRAAdapter.forward(self, x, out) + 1e-3 * out

    for name in ("forward_equals_delta", "merge_equals_unmerged", "unload", "several"):
        fails(name, broken(forward=forward))


def test_refused_merge_must_be_tagged():
    def delta(self):
        raise NotImplementedError

    fails("merge_equals_unmerged", lambda: LoRA(rank=2), mergeable=False)
    CHECKS["merge_equals_unmerged"](Case(broken(delta=delta), {**TAGS, "mergeable": False}))


def test_gradient_cut_off():
    def forward(self, x, out):
        return out + self.site.expand(self.site.reduce(x, self.lora_A.detach()), self.lora_B)

    fails("gradients", broken(forward=forward))

    def doubled(self, x, out):
        change = self.site.expand(self.site.reduce(x, self.lora_A), self.lora_B)
        return out + 2 * change - change.detach()

    fails("gradients", broken(forward=doubled))


def test_state_outside_the_state_dict():
    def start(self, site, weight, rank, scaling):
        LoRAAdapter.__init__(self, site, weight, rank, scaling)
        self.hidden = torch.rand(())

    def forward(self, x, out):
        return LoRAAdapter.forward(self, x, out) * (1 + self.hidden)

    torch.manual_seed(0)
    make = broken(__init__=start, forward=forward)
    fails("save_and_load", make)


def test_base_touched():
    def start(self, site, weight, rank, scaling):
        LoRAAdapter.__init__(self, site, weight, rank, scaling)
        weight.mul_(0.5)

    fails("base_untouched", broken(__init__=start))
    fails("delete", broken(__init__=start))
    fails("disable", broken(__init__=start))


def test_wrong_dtype_and_graph_break():
    def start(self, site, weight, rank, scaling):
        LoRAAdapter.__init__(self, site, weight.float(), rank, scaling)

    fails("dtype", broken(__init__=start))

    def printing(self, x, out):
        if float(out.sum()) > 1e9:
            return out
        return LoRAAdapter.forward(self, x, out)

    fails("compiled", broken(forward=printing))


def test_inert_and_irreproducible():
    def forward(self, x, out):
        return out

    fails("disable", broken(forward=forward))

    def start(self, site, weight, rank, scaling):
        LoRAAdapter.__init__(self, site, weight, rank, scaling)
        generator = torch.Generator()
        generator.seed()
        nn.init.normal_(self.lora_A, generator=generator)

    fails("reproducible", broken(__init__=start))
