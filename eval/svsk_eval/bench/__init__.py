# SPDX-License-Identifier: Apache-2.0
"""Task scores of a reference model and its variants on the same items: ``svsk bench``."""
