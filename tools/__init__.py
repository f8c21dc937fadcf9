# SPDX-License-Identifier: Apache-2.0
"""Tools of the project: the base model of examples and tests, pages, pictures, prose, release. Nothing is installed."""
