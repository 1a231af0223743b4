"""Tasks whose answers can be graded, generated from a seed: no text needs to be downloaded."""

from rewriter.quality.tasks.affixes import Affixes
from rewriter.quality.tasks.arithmetic import Arithmetic, RecalledArithmetic
from rewriter.quality.tasks.lists import Lists
from rewriter.quality.tasks.people import People
from rewriter.quality.tasks.retrieval import Retrieval
from rewriter.quality.tasks.task import END, Question, Sample, Task, final_answer
from rewriter.quality.tasks.tracking import Tracking

__all__ = ["END", "TASKS", "Question", "Sample", "Task", "final_answer"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Arithmetic(),
        RecalledArithmetic(),
        People(),
        Lists(),
        Retrieval(),
        Tracking(),
        Affixes(),
    )
}
"""Every task by name."""
