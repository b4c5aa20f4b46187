"""What generated records are made of: names, places and things, and how one is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST = (
    "Aaron Abena Adam Aisha Alba Alice Amara Amir Ana Anders Andrea Anika Anton Aria Arjun Astrid "
    "Beatriz Ben Bianca Boris Carla Carlos Cecilia Chen Chidi Chloe Clara Conor Daniel Daria David "
    "Diego Dina Elena Elias Ella Emeka Emma Erik Esther Eva Farah Felix Fiona Gabriel Grace Greta "
    "Hana Hassan Helen Hugo Ibrahim Ida Imani Ines Isaac Ivan Jack Jamal James Jana Jin Joan Jonas "
    "Jorge Julia Kai Karim Kate Kenji Lars Laura Leila Leo Lina Lucas Lucia Maja Marco Maria Mateo "
    "Maya Mina Nadia Nina Noah Nora Olga Omar Oscar Paula Pedro Petra Priya Rafael Rania Ravi Rosa "
    "Ruth Sam Sara Simon Sofia Tariq Tess Theo Tom Uma Vera Victor Wei Yara Yusuf Zara Zoe"
).split()
LAST = (
    "Adeyemi Ahmed Almeida Andersen Baker Banerjee Barros Bauer Becker Bell Berg Bianchi Blake "
    "Brandt Brooks Campos Carter Castro Chan Clarke Costa Cruz Dahl Darwish Davies Diaz Dubois "
    "Duarte Eklund Ellis Fischer Fontaine Foster Garcia Gomez Greene Gupta Haas Hall Hansen Haruna "
    "Hayes Hill Hoffman Horvat Hughes Ito Iyer Jansen Jensen Joshi Kamara Kaplan Kaur Keller Khan "
    "Kim Klein Kovac Kumar Lambert Larsen Lee Lehmann Lima Lopez Lund Maier Marin Mbeki Mendes "
    "Meyer Moore Morales Moretti Nakamura Nguyen Nilsson Novak Okafor Olsen Ortega Osman Park Patel "
    "Pereira Petrov Quinn Ramos Reid Rossi Ruiz Saito Santos Schmidt Sharma Silva Singh Sousa Stone "
    "Suzuki Tanaka Thomas Torres Turner Vargas Vidal Vogel Walker Wang Weber West Wong Wright Yilmaz "
    "Young Zhang Zimmer"
).split()
CITIES = (
    "Accra Amsterdam Athens Austin Bangkok Barcelona Berlin Bogota Boston Brussels Cairo Calgary "
    "Chicago Copenhagen Dallas Delhi Denver Dublin Geneva Hamburg Hanoi Helsinki Houston Istanbul "
    "Jakarta Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Miami Milan Montreal Mumbai Munich "
    "Nairobi Naples Osaka Oslo Paris Phoenix Prague Quito Riga Rome Seattle Seoul Sofia Stockholm "
    "Sydney Taipei Tokyo Toronto Tunis Vienna Warsaw Zurich"
).split()
ITEMS = [
    f"{adjective} {noun}"
    for adjective in (
        "black",
        "blue",
        "green",
        "red",
        "white",
        "steel",
        "wooden",
        "leather",
        "glass",
        "compact",
        "folding",
        "cordless",
    )
    for noun in (
        "desk lamp",
        "kettle",
        "backpack",
        "office chair",
        "coffee grinder",
        "toaster",
        "bookshelf",
        "water bottle",
        "headset",
        "keyboard",
        "rice cooker",
        "suitcase",
        "mirror",
        "clock",
        "blender",
        "tent",
    )
]
MONTHS = ("January February March April May June July August September October November December").split()
CARRIERS = ("Northpost", "Swift Parcel", "Bluebird", "Cargo One", "Harbor Express", "Redline")
PLANS = ("basic", "family", "student", "team", "premium", "business")
TEAMS = ("billing", "network", "hardware", "accounts", "returns", "security")
PROBLEMS = (
    "cannot log in",
    "screen stays black",
    "charged twice",
    "slow connection",
    "missing parts",
    "password reset fails",
    "app crashes on start",
    "no sound",
    "wrong address printed",
    "battery drains fast",
)
ROOMS = ("single room", "double room", "twin room", "suite", "family room")
AIRLINES = ("Aurora Air", "Meridian", "Coastline", "Polar Wings", "Sunbird", "Transalta")

Draw = Callable[[random.Random], str]


def pick(options: tuple[str, ...] | list[str]) -> Draw:
    return lambda rng: rng.choice(options)


def number(low: int, high: int) -> Draw:
    return lambda rng: str(rng.randint(low, high))


def money(low: int, high: int) -> Draw:
    return lambda rng: f"${rng.randint(low, high)}"


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def clock(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice(range(0, 60, 5)):02d}"


def seat(rng: random.Random) -> str:
    return f"{rng.randint(1, 42)}{rng.choice('ABCDEF')}"
