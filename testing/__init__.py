# SPDX-License-Identifier: Apache-2.0
"""Shared by tests, benchmarks and the demo: a server process, random models and the oracle for answers."""
