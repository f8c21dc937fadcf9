# SPDX-License-Identifier: Apache-2.0
"""Flags, keywords, adapter loading, metrics, and requests on their way to the engine core."""
