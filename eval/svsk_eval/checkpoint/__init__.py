# SPDX-License-Identifier: Apache-2.0
"""Where did a checkpoint's bits go, what does each matrix lose, and what could be better?"""
