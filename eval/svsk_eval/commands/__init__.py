# SPDX-License-Identifier: Apache-2.0
"""What does each subcommand ask for, and of whom? `cli.py` puts them together."""
