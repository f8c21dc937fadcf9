"""Triton's interpreter, TRITON_INTERPRET=1: kernels and model runner V2 without a GPU."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Backend:
    """What Triton must see to count a CPU as a device: vLLM then takes model runner V2."""

    class driver:
        @staticmethod
        def is_active() -> bool:
            return True


def install() -> None:
    """Make this process take the CPU for a device; before vLLM is imported."""
    import triton.backends

    triton.backends.backends["cpu"] = _Backend
