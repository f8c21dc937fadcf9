# SPDX-License-Identifier: Apache-2.0
"""The mathematics of PARADE: `reference` states it once, in plain PyTorch; the kernels are measured against it."""

import os

# For tests: "kernels" or "reference", whatever the device.
OVERRIDE = "PARADE_OPS"


def use_kernels(device_type: str) -> bool:
    """Whether generators run as Triton kernels on such a device; else they run as the reference.

    Raises:
        ValueError: the override names neither.
    """
    choice = os.environ.get(OVERRIDE)
    if choice is None:
        return device_type == "cuda"
    if choice not in ("kernels", "reference"):
        raise ValueError(f"{OVERRIDE} is {choice!r}; expected kernels or reference")
    return choice == "kernels"
