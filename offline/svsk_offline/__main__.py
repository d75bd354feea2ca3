# SPDX-License-Identifier: Apache-2.0
"""The commands of the offline tool as a module: ``python -m svsk_offline``, also under torchrun."""

from svsk_offline.cli import app

if __name__ == "__main__":
    app()
