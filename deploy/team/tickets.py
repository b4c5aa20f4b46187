"""Support tickets: what the demo team works on, read from JSON Lines."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantize.core.refusals import first_fault


class TicketError(ValueError):
    """A file of tickets cannot be used. The text names the file, the line, the key and the fix."""


CONTACT, DETAILS = "contact_specialist", "details_specialist"
"""Agents that look into a record for one thing."""


class Aside(BaseModel):
    """What a specialist is asked about the record, and the right answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Ticket(BaseModel):
    """One support ticket with the answers that are right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    message: str = Field(min_length=1, description="what the customer wrote")
    intent: str = Field(min_length=1, description="the right class of the message")
    record: str = Field(min_length=1, pattern=r"^\S", description="the business record that it is about")
    question: str = Field(min_length=1, description="what is asked about the record")
    answer: str = Field(min_length=1, description="the right answer to the question")
    summary: str = Field(min_length=1, description="a right summary of the record")
    facts: tuple[str, ...] = Field(min_length=1, description="what a summary has to contain")
    specialists: dict[str, Aside] = Field(description="agent to what it is asked")

    @field_validator("specialists")
    @classmethod
    def _are_both(cls, specialists: dict[str, Aside]) -> dict[str, Aside]:
        if specialists.keys() != {CONTACT, DETAILS}:
            raise ValueError(f"must be {CONTACT} and {DETAILS}")
        return specialists

    @property
    def record_id(self) -> str:
        """The number in the record's first line, which is its title."""
        return self.record.partition("\n")[0].split()[-1]


def read_tickets(path: Path) -> list[Ticket]:
    """Read one ticket per line; blank lines are skipped. Raises TicketError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TicketError(f"{path} cannot be read ({error.strerror}); give a file of tickets") from None
    except UnicodeDecodeError:
        raise TicketError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    tickets: list[Ticket] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        ticket = _parse(line, f"{path}:{number}")
        if (first := seen.setdefault(ticket.id, number)) != number:
            raise TicketError(f"{path}:{number}: id: {ticket.id!r} is also on line {first}; rename one")
        tickets.append(ticket)
    if not tickets:
        raise TicketError(f"{path} has no tickets; put one JSON object on each line")
    return tickets


def _parse(line: str, where: str) -> Ticket:
    try:
        return Ticket.model_validate_json(line)
    except ValidationError as error:
        kind, fault = error.errors()[0]["type"], first_fault(error)
    if kind in ("json_invalid", "model_type"):
        raise TicketError(f"{where}: is not a JSON object; put one ticket on each line")
    raise TicketError(f"{where}: {fault}; a ticket has {', '.join(Ticket.model_fields)}")
