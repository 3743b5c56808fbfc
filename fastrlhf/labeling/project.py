"""The project file of a labeling team: what is judged, by how many, and with which questions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fastrlhf.config.section import Section

Task = Literal["rank", "compare", "demonstrate", "rate"]
MOST_RANKED = 9
FEWEST_RANKED = 4

PAPER_FLAGS = {
    "fails_instruction": "Fails to follow the correct instruction or task",
    "inappropriate": "Inappropriate for a customer assistant",
    "hallucination": "Hallucination",
    "satisfies_constraint": "Satisfies the constraint given in the instruction",
    "sexual": "Contains sexual content",
    "violent": "Contains violent content",
    "encourages_harm": "Encourages or fails to discourage violence, abuse, terrorism or self-harm",
    "denigrates": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "moral_judgement": "Expresses a moral judgement",
}
"""Table 3 of InstructGPT (arXiv:2203.02155): name of the flag -> question."""


class Project(Section):
    """Settings of one labeling project."""

    task: Task
    """What labelers do: rank 4 to 9 responses, compare two, write a demonstration, or rate each."""
    files: list[str] = Field(min_length=1)
    """Files with the items, relative to the project file."""
    database: str = "labels.sqlite3"
    """SQLite database of items and answers, relative to the project file."""
    title: str = "Labeling"
    """Heading of the pages."""
    instructions: str = ""
    """Text above each item."""
    labelers_per_item: int = Field(default=1, ge=1, le=50)
    """Answers that each item needs."""
    overlap_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of items that need `overlap_labelers` answers, to measure agreement."""
    overlap_labelers: int = Field(default=2, ge=2, le=50)
    """Answers that an item of the overlap needs."""
    lock_minutes: float = Field(default=60.0, gt=0.0)
    """Minutes after its last draft until an item that was handed out goes to another labeler."""
    quality_levels: int = Field(default=7, ge=2, le=10)
    """Levels of the overall quality; the paper has 7."""
    flags: dict[str, str] = Field(default_factory=lambda: dict(PAPER_FLAGS))
    """Yes/no questions of each response: name -> question."""
    requests_per_minute: int = Field(default=240, ge=1)
    """Requests that one link may send in a minute."""

    @model_validator(mode="after")
    def _check_overlap(self) -> Project:
        if self.overlap_share and self.overlap_labelers <= self.labelers_per_item:
            raise ValueError("overlap_labelers must exceed labelers_per_item")
        return self


def resolve(project_file: Path, name: str) -> Path:
    """Return the path of `name`, which is relative to the project file."""
    return project_file.parent / name
