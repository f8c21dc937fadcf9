# SPDX-License-Identifier: Apache-2.0
"""An engine must not outlive its replica.

vLLM's engine core is a process of its own. It holds the device memory that the next replica needs, and nobody ends it
when the replica is killed.
"""

import os
import select
import signal
import threading

# Process without which the engine's processes end.
VARIABLE = "PARADE_LIFELINE"


def hold() -> None:
    """Let processes that are started from here on end with this one."""
    os.environ[VARIABLE] = str(os.getpid())


def follow() -> None:
    """End this process as soon as the one that holds it has ended; called in every process of vLLM."""
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
