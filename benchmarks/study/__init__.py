# SPDX-License-Identifier: Apache-2.0
"""Does the prompt matter? PARADE, LoRA and (IA)3 trained on the same tasks. README.md says how to run it."""
