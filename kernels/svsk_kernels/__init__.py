# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of SVSK layers. Importing the package imports nothing: not even torch."""
