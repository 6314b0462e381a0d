"""A model's answer in words, with what is known of similar patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def finding(label: str, probability: float, abstained: bool, similar: Sequence[str]) -> str:
    """One line, such as ``opacity (probability 0.93); of 5 similar patients 4 have opacity, 1 normal``.

    ``probability``, 0..1, is that of ``label``; ``similar`` are the labels of the patients most like this one. It says where
    the model abstains, and where most of them have another label: either is a reason for a person to look.
    """
    parts = [f"{label} (probability {probability:.2f})"]
    if abstained:
        parts.append("the model abstains: a person should decide")
    if similar:
        counts = Counter(similar).most_common()
        parts.append(f"of {len(similar)} similar patients " + ", ".join(f"{count} have {name}" for name, count in counts))
        if 2 * Counter(similar)[label] < len(similar):
            parts.append("most of them have another label")
    return "; ".join(parts)
