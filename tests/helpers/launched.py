"""The command line as one of several launched processes.

LAWCAT_TEST_KILL=RANK:STAGE:STEP ends the process of that rank before that step, as ``kill -9`` would.
"""

import os
import signal

from lawcat_edge.cli import main
from lawcat_edge.distill.train import StageRun

rank, stage, step = os.environ.get("LAWCAT_TEST_KILL", "::").split(":")
take_step = StageRun._step


def step_or_die(self, feed):
    if self.stage == stage and self.progress.step == int(step) and os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, feed)


StageRun._step = step_or_die  # type: ignore[method-assign]
main()
