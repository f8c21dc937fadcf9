# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of PARADE against the base model and LoRA. See `python -m benchmarks --help`."""
