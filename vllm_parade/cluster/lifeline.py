# SPDX-License-Identifier: Apache-2.0
"""Ends the engine's processes when their replica ends.

vLLM's engine core is a separate process. When the replica is killed, it keeps running and holds the device memory that
the next replica needs.
"""

import os
import select
import signal
import threading

# Environment variable with the replica's process id.
VARIABLE = "PARADE_LIFELINE"


def hold() -> None:
    """Make processes started after this call end when this process ends."""
    os.environ[VARIABLE] = str(os.getpid())


def follow() -> None:
    """Kill this process as soon as the process that called `hold` has ended. Called in every process of vLLM."""
    holder = os.environ.get(VARIABLE)
    if holder is None or int(holder) == os.getpid() or any(one.name == VARIABLE for one in threading.enumerate()):
        return
    threading.Thread(target=_wait, args=(int(holder),), name=VARIABLE, daemon=True).start()


def _wait(holder: int) -> None:
    try:
        descriptor = os.pidfd_open(holder)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
