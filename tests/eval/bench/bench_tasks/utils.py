# SPDX-License-Identifier: Apache-2.0
"""Data of the tasks that test the harness."""

import datasets


def load(**_: object) -> dict[str, datasets.Dataset]:
    """Twenty items; the prompts of the last two are those of the first two."""
    rows = [
        {
            "question": f"Q: what comes after {i % 18}?\nA:",
            "answer": str(i % 18 + 1),
            "label": i % 3,
        }
        for i in range(20)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
