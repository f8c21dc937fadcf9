# SPDX-License-Identifier: Apache-2.0
"""What tests, benchmarks and the demo share: a server process, random models and the oracle for answers."""
