# SPDX-License-Identifier: Apache-2.0
"""The Ray Serve application: routes requests to replicas and loads adapters on all of them.

    ingress.py ----> router.py (routing.py) ----> replica.py: engine.py, asgi.py, lifeline.py
        |                                             |
        +---------> coordinator.py: adapters.py <-----+ follower.py

`app.py` builds the application. Importing this package loads none of these modules, because the plugin imports
`lifeline.py` in every process of vLLM.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["AffinityRule"]

if TYPE_CHECKING:
    from vllm_parade.cluster.routing import AffinityRule


def __getattr__(name: str) -> Any:
    # Lazy: the rule imports NumPy.
    if name == "AffinityRule":
        from vllm_parade.cluster.routing import AffinityRule

        return AffinityRule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
