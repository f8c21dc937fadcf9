# SPDX-License-Identifier: Apache-2.0
"""What PARADE costs beside the base model and LoRA. `python -m benchmarks --help`."""
