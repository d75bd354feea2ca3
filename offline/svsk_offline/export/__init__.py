# SPDX-License-Identifier: Apache-2.0
"""What else reads a checkpoint: other formats, and what is lost in each (``formats.py``)."""
