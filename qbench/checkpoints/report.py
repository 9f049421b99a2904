"""What became of every key of a checkpoint, and of every value that it did not have."""

from __future__ import annotations

import dataclasses

TAKEN, TRANSLATED, IGNORED = "taken", "translated", "ignored"


@dataclasses.dataclass(frozen=True)
class KeyOutcome:
    """One key of the checkpoint.

    Attributes:
        key: As in the checkpoint.
        outcome: `"taken"` bit by bit, `"translated"` into another form of the same value, or `"ignored"`.
        to: Key of the model's state dict; empty where it was ignored.
        note: How it was translated, or why it was ignored.
    """

    key: str
    outcome: str
    to: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class MissingValue:
    """A parameter, buffer or quantizer of the model that the checkpoint says nothing of: path, and what holds now."""

    path: str
    note: str


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """Every key of the checkpoint once, and what the checkpoint lacked.

    Attributes:
        source: `"torch.ao"` or `"MQBench"`.
        keys: In the order of the checkpoint.
        missing: In the order of the model.
    """

    source: str
    keys: tuple[KeyOutcome, ...]
    missing: tuple[MissingValue, ...] = ()

    @property
    def taken(self) -> tuple[KeyOutcome, ...]:
        """Keys whose tensor is now the model's, bit by bit."""
        return self._of(TAKEN)

    @property
    def translated(self) -> tuple[KeyOutcome, ...]:
        """Keys whose value is now the model's in another form."""
        return self._of(TRANSLATED)

    @property
    def ignored(self) -> tuple[KeyOutcome, ...]:
        """Keys that have no place in the model, with the reason."""
        return self._of(IGNORED)

    def _of(self, outcome: str) -> tuple[KeyOutcome, ...]:
        return tuple(found for found in self.keys if found.outcome == outcome)

    def __str__(self) -> str:
        counts = f"{len(self.taken)} taken, {len(self.translated)} translated, {len(self.ignored)} ignored"
        lines = [f"{len(self.keys)} keys of {self.source}: {counts}; {len(self.missing)} values missing"]
        for found in self.keys:
            to = f" → {found.to}" if found.to else ""
            lines.append(f"{found.outcome}: {found.key}{to}" + (f" ({found.note})" if found.note else ""))
        lines += [f"missing: {found.path} ({found.note})" for found in self.missing]
        return "\n".join(lines)
