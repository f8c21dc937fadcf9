# SPDX-License-Identifier: Apache-2.0
"""From a user's flag or request to what the engine core receives."""
