"""A measurement that leaves a trace of every run."""

import os
import time

from corollary.claims import Paired, Trial, claim


@claim(control={"gain": 0.0})
def counted(trial: Trial, gain: float = 1.0) -> Paired:
    time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
    with open(os.environ["TOY_TRACE"], "a") as trace:
        trace.write(f"{gain} {trial.seed}\n")
    return Paired(ours=1.0 - gain + trial.rng.uniform(0, 0.1), baseline=1.0 + trial.rng.uniform(0, 0.1))
