"""Business records, questions about them and one-sentence summaries, all generated from a seed.

A record is what a back office would paste into a prompt: a title line with an identifier and one
``field: value`` line per field. Every question has exactly one right answer that can be read off
the record, and a field may be missing, in which case the right answer says so. That makes the
grounded role checkable without a judge: the answer is right, or it is not.

Seeds below :data:`HELD_OUT_SEED` are for training; evaluation and the demo use seeds from there on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from deploy.assistant.words import (
    AIRLINES,
    CARRIERS,
    CITIES,
    ITEMS,
    PLANS,
    PROBLEMS,
    ROOMS,
    TEAMS,
    Draw,
    clock,
    date,
    money,
    number,
    person,
    pick,
    seat,
)

HELD_OUT_SEED = 1_000_000_000
"""Records drawn from seeds at or above this number are never trained on."""

NOT_STATED = "The record does not say."


@dataclass(frozen=True)
class Field:
    """One line of a record: how its value is drawn, how it is asked for and answered.

    ``questions`` and ``answer`` may use ``{id}`` (the record's identifier); ``answer`` also
    ``{value}``. A ``fact`` field is one that a summary has to contain.
    """

    name: str
    draw: Draw
    questions: tuple[str, ...]
    answer: str
    fact: bool = True


@dataclass(frozen=True)
class Kind:
    """A family of records. ``summary`` is a format string over the field names and ``id``."""

    title: str
    fields: tuple[Field, ...]
    summary: str


def _customer(word: str = "customer") -> Field:
    return Field(
        word,
        person,
        (
            f"who is the {word} on {{id}}",
            f"what is the {word}'s name",
            f"which {word} does {{id}} belong to",
        ),
        f"The {word} is {{value}}.",
    )


KINDS: tuple[Kind, ...] = (
    Kind(
        "Order",
        (
            _customer(),
            Field(
                "item",
                pick(ITEMS),
                ("what did i order", "which item is in order {id}", "what is the product"),
                "The item is a {value}.",
            ),
            Field(
                "quantity",
                number(2, 40),
                ("how many did i order", "what is the quantity of order {id}", "how many pieces are there"),
                "The quantity is {value}.",
            ),
            Field(
                "total",
                money(20, 990),
                ("how much does order {id} cost", "what is the total", "what do i pay in total"),
                "The total is {value}.",
            ),
            Field(
                "status",
                pick(("shipped", "packed", "paid", "on hold", "cancelled", "delivered")),
                ("what is the status of order {id}", "where does my order stand", "has my order been sent"),
                "The status is {value}.",
            ),
            Field(
                "arrival",
                date,
                ("when will order {id} arrive", "when do i get my order", "what is the arrival date"),
                "The arrival date is {value}.",
            ),
            Field(
                "carrier",
                pick(CARRIERS),
                ("who delivers order {id}", "which carrier brings it", "what company ships my order"),
                "The carrier is {value}.",
                fact=False,
            ),
        ),
        "{customer} ordered {quantity} of the {item} for {total}; the order is {status} "
        "and arrives on {arrival}.",
    ),
    Kind(
        "Invoice",
        (
            _customer("payer"),
            Field(
                "amount",
                money(40, 9900),
                ("how much is invoice {id}", "what amount do i owe", "what is the amount of the invoice"),
                "The amount is {value}.",
            ),
            Field(
                "due",
                date,
                ("when is invoice {id} due", "by when must i pay", "what is the due date"),
                "The due date is {value}.",
            ),
            Field(
                "state",
                pick(("open", "paid", "overdue", "disputed", "partly paid")),
                ("is invoice {id} paid", "what state is the invoice in", "what is the state of {id}"),
                "The state is {value}.",
            ),
            Field(
                "account",
                number(100000, 999999),
                ("which account do i pay into", "what is the account number", "what account is on {id}"),
                "The account number is {value}.",
                fact=False,
            ),
            Field(
                "contact",
                person,
                ("who do i contact about {id}", "who handles the invoice", "who is the contact person"),
                "The contact is {value}.",
                fact=False,
            ),
        ),
        "{payer} has the invoice over {amount}, which is {state} and due on {due}.",
    ),
    Kind(
        "Booking",
        (
            _customer("passenger"),
            Field(
                "airline",
                pick(AIRLINES),
                ("which airline operates {id}", "who do i fly with", "what is the airline"),
                "The airline is {value}.",
            ),
            Field(
                "origin",
                pick(CITIES),
                ("where does the flight leave from", "what is the departure city", "where do i board"),
                "The flight leaves from {value}.",
            ),
            Field(
                "destination",
                pick(CITIES),
                ("where does the flight go", "what is the destination of {id}", "which city do i land in"),
                "The flight goes to {value}.",
            ),
            Field(
                "date",
                date,
                ("on which day is the flight", "when do i fly", "what is the date of booking {id}"),
                "The flight is on {value}.",
            ),
            Field(
                "departure",
                clock,
                ("at what time does the flight leave", "what is the departure time", "when does it take off"),
                "The departure time is {value}.",
                fact=False,
            ),
            Field(
                "seat",
                seat,
                ("what seat do i have", "which seat is on {id}", "where do i sit"),
                "The seat is {value}.",
                fact=False,
            ),
        ),
        "{passenger} flies with {airline} from {origin} to {destination} on {date}.",
    ),
    Kind(
        "Ticket",
        (
            _customer(),
            Field(
                "problem",
                pick(PROBLEMS),
                ("what is ticket {id} about", "what is the problem", "which problem was reported"),
                "The problem is: {value}.",
            ),
            Field(
                "team",
                pick(TEAMS),
                ("which team works on {id}", "who is responsible", "what team has the ticket"),
                "The team is {value}.",
            ),
            Field(
                "priority",
                pick(("low", "normal", "high", "urgent")),
                ("how urgent is ticket {id}", "what is the priority", "which priority does it have"),
                "The priority is {value}.",
            ),
            Field(
                "opened",
                date,
                ("when was ticket {id} opened", "since when is it open", "what day was it reported"),
                "The ticket was opened on {value}.",
            ),
            Field(
                "agent",
                person,
                ("who is the agent", "who looks after ticket {id}", "which agent is assigned"),
                "The agent is {value}.",
                fact=False,
            ),
        ),
        "{customer} reported on {opened} the problem {problem}; the {team} team has it "
        "with {priority} priority.",
    ),
    Kind(
        "Subscription",
        (
            _customer("subscriber"),
            Field(
                "plan",
                pick(PLANS),
                ("which plan do i have", "what plan is subscription {id}", "what is my plan"),
                "The plan is {value}.",
            ),
            Field(
                "price",
                money(5, 199),
                ("how much is it per month", "what does subscription {id} cost", "what is the price"),
                "The price is {value} per month.",
            ),
            Field(
                "renewal",
                date,
                ("when does subscription {id} renew", "what is the renewal date", "when is it renewed"),
                "The renewal date is {value}.",
            ),
            Field(
                "devices",
                number(1, 25),
                (
                    "how many devices are allowed",
                    "what is the device limit",
                    "how many devices does {id} cover",
                ),
                "The number of devices is {value}.",
            ),
            Field(
                "payment",
                pick(("card", "invoice", "bank transfer", "voucher")),
                ("how do i pay for it", "what is the payment method", "how is {id} paid"),
                "The payment method is {value}.",
                fact=False,
            ),
        ),
        "{subscriber} has the {plan} plan for {price} per month with {devices} devices, "
        "renewing on {renewal}.",
    ),
    Kind(
        "Stay",
        (
            _customer("guest"),
            Field(
                "city",
                pick(CITIES),
                ("in which city is the hotel", "where is stay {id}", "what city do i stay in"),
                "The hotel is in {value}.",
            ),
            Field(
                "room",
                pick(ROOMS),
                ("what room did i book", "which room is reserved", "what kind of room is {id}"),
                "The room is a {value}.",
            ),
            Field(
                "nights",
                number(1, 21),
                ("how many nights do i stay", "how long is stay {id}", "what is the number of nights"),
                "The number of nights is {value}.",
            ),
            Field(
                "arrival",
                date,
                ("when do i check in", "what is the arrival day", "on which date does stay {id} begin"),
                "The check-in date is {value}.",
            ),
            Field(
                "rate",
                money(45, 690),
                ("what is the rate per night", "how much is one night", "what does {id} cost a night"),
                "The rate is {value} per night.",
                fact=False,
            ),
        ),
        "{guest} stays {nights} nights in {city} in a {room} from {arrival}.",
    ),
)


@dataclass(frozen=True)
class Record:
    """A generated record: its text, one-sentence summary, key facts and question/answer pairs."""

    text: str
    summary: str
    facts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    """Pairs of (question, the only right answer)."""
    contact: tuple[str, str]
    """The pair about the person."""
    details: tuple[str, str]
    """The pair about the last fact of a summary."""


def make_record(seed: int) -> Record:
    """Generate the record that belongs to ``seed``; the same seed always gives the same record."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    identifier = f"{rng.choice('ABCDEFGHKLMNPRSTVWXYZ')}{rng.randint(1000, 9999)}"
    values = {field.name: field.draw(rng) for field in kind.fields}
    optional = [field.name for field in kind.fields if not field.fact]
    missing = rng.choice(optional) if rng.random() < 0.35 else None
    shown = [field for field in kind.fields if field.name != missing]
    rng.shuffle(shown)
    lines = [f"{kind.title} {identifier}"] + [f"{field.name}: {values[field.name]}" for field in shown]
    questions = []
    for field in kind.fields:
        question = rng.choice(field.questions).format(id=identifier)
        stated = field.name != missing
        answer = field.answer.format(id=identifier, value=values[field.name]) if stated else NOT_STATED
        questions.append((question, answer))
    last = max(index for index, field in enumerate(kind.fields) if field.fact)
    contact, details = questions[0], questions[last]
    rng.shuffle(questions)
    return Record(
        text="\n".join(lines),
        summary=kind.summary.format(id=identifier, **values),
        facts=tuple(values[field.name] for field in kind.fields if field.fact),
        questions=tuple(questions),
        contact=contact,
        details=details,
    )
