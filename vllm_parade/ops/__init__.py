# SPDX-License-Identifier: Apache-2.0
"""The mathematics of PARADE: `reference` states it once, in plain PyTorch; everything else is measured against it."""
