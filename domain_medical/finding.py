"""A model's answer in words, with what is known of similar studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def finding(label: str, probability: float, abstained: bool, similar: Sequence[str]) -> str:
    """One line, such as ``opacity (probability 0.93); of 5 similar studies 4 have opacity, 1 has normal``.

    ``probability``, 0..1, is that of ``label``; ``similar`` are the labels of the studies most like this one. It says where
    the model abstains, and where most of them have another label: either is a reason for a person to look.
    """
    parts = [f"{label} (probability {probability:.2f})"]
    if abstained:
        parts.append("the model abstains: a person should decide")
    if similar:
        counts = Counter(similar).most_common()
        told = ", ".join(f"{count} {'has' if count == 1 else 'have'} {name}" for name, count in counts)
        parts.append(f"of {len(similar)} similar {'study' if len(similar) == 1 else 'studies'} {told}")
        if 2 * Counter(similar)[label] < len(similar):
            parts.append("most of them have another label")
    return "; ".join(parts)
