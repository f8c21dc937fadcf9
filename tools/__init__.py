# SPDX-License-Identifier: Apache-2.0
"""Tools of the project: base model of examples and tests, tables, pictures, prose, release. Not part of the wheel."""
