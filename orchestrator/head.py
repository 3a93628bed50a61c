"""Whether the head of the Ray cluster is there: a driver that has lost it ends with a sentence, before Ray ends it."""

from __future__ import annotations

import os
import socket
import time

from envs.errors import UserError
from orchestrator.connection import leave

EVERY_SECONDS = 5.0  # between two looks, at most
ANSWER_SECONDS = 2.0
# Ray ends a driver's process on the spot when the head's control service (GCS) has not answered for so long. It is 60 s
# unless this variable says otherwise, as it does where the service is made to survive its machine.
RAY_VARIABLE, RAY_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
SHARE = 0.5  # of that time, after which the driver leaves by itself: leaving takes 5 s


class HeadLost(UserError):
    """The head's control service does not answer any more."""


class Head:
    """The head of the cluster that this process has joined. It is watched if it can be reached at all, which it cannot
    by Ray's client."""

    def __init__(self) -> None:
        import ray

        self.address = str(ray.get_runtime_context().gcs_address)
        host, _, port = self.address.rpartition(":")
        self._place = (host.strip("[]"), int(port)) if port.isdecimal() else None
        self.patience_s = SHARE * float(os.environ.get(RAY_VARIABLE) or RAY_SECONDS)
        self._every_s = min(EVERY_SECONDS, self.patience_s / 6)
        self._looked = self._answered = time.monotonic()
        self._watched = self._answers()

    def check(self) -> None:
        """Look whether the head answers, every few seconds.

        Raises:
            HeadLost: it has not for too long. This process has left Ray then.
        """
        now = time.monotonic()
        if not self._watched or now - self._looked < self._every_s:
            return
        if self._answers():
            self._answered = now
        self._every_s = min(EVERY_SECONDS, self.patience_s / 6)
        self._looked = now
        if now - self._answered > self.patience_s:
            leave()
            raise HeadLost(
                f"the head of the Ray cluster ({self.address}) has not answered for {now - self._answered:.0f} s. "
                "Nothing is lost: start the cluster again and continue with `offsweep resume NAME`"
            )

    @property
    def is_gone(self) -> bool:
        """Whether it does not answer at this moment: calls to Ray would then wait until Ray ends the process."""
        return self._watched and not self._answers()

    def _answers(self) -> bool:
        if self._place is None:
            return False
        try:
            socket.create_connection(self._place, timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True
