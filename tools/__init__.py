# SPDX-License-Identifier: Apache-2.0
"""Tools for people who work on the project: pages, pictures, prose, release. Nothing here is installed."""
