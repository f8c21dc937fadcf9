# SPDX-License-Identifier: Apache-2.0
"""More than one replica: which of them gets a request, and how adapters reach all of them.

    ingress.py ----> router.py (routing.py) ----> replica.py: engine.py, asgi.py, lifeline.py
        |                                             |
        +---------> coordinator.py: adapters.py <-----+ follower.py

Nothing that is imported here loads vLLM or Ray. `app.py` puts the application together.
"""

from vllm_parade.cluster.routing import AffinityRule

__all__ = ["AffinityRule"]
