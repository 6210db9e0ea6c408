"""Points that end the process that evaluates them. A module of its own: other processes import it."""

import os
import signal
from pathlib import Path

from flashmoe.points import Point


class FatalPoint(Point):
    """Kills its process, as often as inputs["times"] says, counted in the file inputs["counter"]."""

    def evaluate(self):
        counter = Path(self.inputs["counter"])
        deaths = len(counter.read_text()) if counter.exists() else 0
        if deaths < self.inputs["times"]:
            with counter.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate()
