"""Triton's interpreter, TRITON_INTERPRET=1: kernels and model runner V2 without a GPU."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Backend:
    """A Triton backend that makes the CPU count as a device; vLLM then takes model runner V2."""

    class driver:
        @staticmethod
        def is_active() -> bool:
            return True


def install() -> None:
    """Register the CPU as a Triton device in this process; call it before vLLM is imported."""
    import triton.backends

    triton.backends.backends["cpu"] = _Backend
