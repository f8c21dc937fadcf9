# SPDX-License-Identifier: Apache-2.0
"""The mathematics of PARADE: `reference` defines it in plain PyTorch, and the kernels are tested against it."""

import os

# Environment variable for tests: "kernels" or "reference", on any device.
OVERRIDE = "PARADE_OPS"


def use_kernels(device_type: str) -> bool:
    """Whether generators run as Triton kernels on this type of device; otherwise they run as the reference.

    Raises:
        ValueError: PARADE_OPS has another value.
    """
    choice = os.environ.get(OVERRIDE)
    if choice is None:
        return device_type == "cuda"
    if choice not in ("kernels", "reference"):
        raise ValueError(f"{OVERRIDE} is {choice!r}; expected kernels or reference")
    return choice == "kernels"
