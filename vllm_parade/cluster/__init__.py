# SPDX-License-Identifier: Apache-2.0
"""More than one replica: which of them gets a request, and how adapters reach all of them.

    ingress.py ----> router.py (routing.py) ----> replica.py: engine.py, asgi.py, lifeline.py
        |                                             |
        +---------> coordinator.py: adapters.py <-----+ follower.py

Importing this package loads none of these modules: the plugin imports `lifeline.py` in every process of vLLM.
`app.py` puts the application together.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["AffinityRule"]

if TYPE_CHECKING:
    from vllm_parade.cluster.routing import AffinityRule


def __getattr__(name: str) -> Any:
    # The rule needs NumPy.
    if name == "AffinityRule":
        from vllm_parade.cluster.routing import AffinityRule

        return AffinityRule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
