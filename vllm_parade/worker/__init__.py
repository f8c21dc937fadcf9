# SPDX-License-Identifier: Apache-2.0
"""Adapters in host memory and on the device, and the model runners that fill a step's metadata."""
