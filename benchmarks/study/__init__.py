# SPDX-License-Identifier: Apache-2.0
"""A study of whether reading the prompt helps: PARADE, LoRA and (IA)3 trained on the same tasks. See README.md."""
