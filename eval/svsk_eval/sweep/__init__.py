# SPDX-License-Identifier: Apache-2.0
"""What does a model keep at which size, beside other quantisers?"""
