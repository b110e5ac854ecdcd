"""All that is known so far, written after each part: `report.json` for programs, `report.md` for people, `output.txt` of all commands."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu.part import Findings, Part, Setting, Table

SHOWN_OUTPUT = 3000  # last characters of what a part's commands wrote, where something is wrong
DONE, NOT_RUN, RUNNING = "done", "not run", "running"


@dataclass
class Entry:
    """A part, and how far it is.

    Attributes:
        status: `DONE`, `RUNNING`, or `NOT_RUN` with the reason behind.
    """

    part: Part
    status: str = NOT_RUN
    seconds: float = 0.0
    findings: Findings = field(default_factory=Findings)

    @property
    def verdict(self) -> str:
        """In a few words."""
        return self.status if self.status != DONE else self.findings.problem or "well"


class Report:
    """What is written into a folder, again and again."""

    def __init__(self, folder: Path, setting: Setting, parts: Iterable[Part]) -> None:
        self.folder, self.setting = folder, setting
        self.entries = [Entry(part) for part in parts]
        self._began = time.time()

    @property
    def is_well(self) -> bool:
        """Whether nothing that was run has a problem."""
        return not any(entry.findings.problem for entry in self.entries)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "report.json").write_text(json.dumps(self._as_json(), indent=1) + "\n")
        (self.folder / "report.md").write_text(self._as_markdown())
        outputs = [f"==== {entry.part.name}\n{entry.findings.output}\n" for entry in self.entries]
        (self.folder / "output.txt").write_text("".join(outputs))

    def _as_json(self) -> dict[str, object]:
        parts = [
            {
                "name": entry.part.name,
                "question": entry.part.question,
                "status": entry.status,
                "seconds": entry.seconds,
                "problem": entry.findings.problem,
                "figures": entry.findings.figures,
            }
            for entry in self.entries
        ]
        return {"began": self._began, "machine": machine_facts(), "rehearsal": self.setting.rehearses, "parts": parts}

    def _as_markdown(self) -> str:
        facts = [f"{name}: {value}" for name, value in machine_facts().items()]
        if self.setting.rehearses:
            facts.append("**A rehearsal on the CPU: no figure says anything about a GPU.**")
        rows = [(entry.part.name, entry.verdict, f"{entry.seconds:.0f}") for entry in self.entries]
        lines = ["# On a GPU", "", *facts_lines(facts), *table_lines(Table("Parts", ("part", "result", "s"), rows))]
        for entry in self.entries:
            if entry.status == DONE:
                lines += section(entry)
        return "\n".join(lines) + "\n"


def machine_facts() -> dict[str, str]:
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
    return {
        "GPUs": "; ".join(names) or "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def section(entry: Entry) -> list[str]:
    """A part as Markdown."""
    findings = entry.findings
    lines = [f"## {entry.part.name}", "", entry.part.question, ""]
    if findings.problem:
        lines += [f"**{findings.problem}**", ""]
    for note in findings.notes:
        lines += [note, ""]
    for table in findings.tables:
        lines += table_lines(table)
    if findings.problem and findings.output:
        lines += ["How its output ends:", "", "```text", findings.output[-SHOWN_OUTPUT:].strip(), "```", ""]
    return lines


def facts_lines(facts: Sequence[str]) -> list[str]:
    return [line for fact in facts for line in (f"- {fact}",)] + [""]


def table_lines(table: Table) -> list[str]:
    """As Markdown, with its title above."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(row) for row in table.rows]
    return [f"### {table.title}", "", line(table.headings), "|" + "---|" * len(table.headings), *rows, ""]
