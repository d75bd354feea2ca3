# SPDX-License-Identifier: Apache-2.0
"""Does a folder fit the architecture that its config.json names?"""
