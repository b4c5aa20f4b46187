"""The configuration of a model that was trained for a role: its variants, the role, what is served of them.

It is looked at before anything is trained, with the base in the trained model's place, written when that is
there, and says at the end what the roles need of what was judged. What somebody has changed in it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.starter import Starter, model_name
from deploy.starting import ENGINES, arrive, with_choice
from deploy.steps import Kept, Say
from deploy.training import base_of, drawn, lines_of
from deploy.unlabelled import shipped_prompts
from gateway.config import Config, ModelConfig, load_config, parse_config
from quantize.core.checkpoint import Checkpoint
from quantize.core.files import write_whole
from quantize.make.calibration import TEMPLATE_MARK
from quantize.train.data import Line, as_item
from quantize.train.loop import TrainError

FILE, ITEMS, CALIBRATION = "tiercel.yaml", "items.jsonl", "calibration.jsonl"
LEAST_LINES, MOST_LINES, MOST_LETTERS = 32, 96, 64_000
"""Of what is trained on so many conversations calibrate, those after the first ``LEAST_LINES`` as far as the
letters go, and as many of those that ship beside them."""
SERVED = "serve"
"""What is kept of the file: the variants that it last was given to serve, and whether they are watched."""
ELSEWHERE = ("models", "canary", "record", "like")
"""Settings of a role that are about the fleet that it was in."""


@dataclass(frozen=True)
class TrainedFile:
    """What the file says. ``starter`` serves all variants that are made; ``beside`` are files that lie in its
    directory, by name."""

    path: Path
    starter: Starter
    settings: Mapping[str, Any]
    calibration: Path | None
    beside: Mapping[str, str]

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.starter.name

    def text(self, source: Path) -> str:
        """The whole file of a model at ``source``, or where that lies beside the file."""
        calibration = f"    calibration: {_quoted(self.calibration)}\n" if self.calibration else ""
        rest = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
        return (
            f"models:\n  {_quoted(self.name)}:\n    path: {_quoted(source)}\n"
            f"{self.starter.served}{calibration}{rest}{self.starter.watch}\n"
        )

    @contextlib.contextmanager
    def of_base(self, base: Checkpoint) -> Iterator[tuple[Config, ModelConfig]]:
        """The configuration before anything is trained, with the base in the model's place. Raises
        ConfigError."""
        with tempfile.TemporaryDirectory() as place:
            self._write_beside(Path(place))
            config = parse_config(self.text(base.path.absolute()), str(self.path), Path(place))
            yield config, config.of(self.name)

    def model(self) -> ModelConfig:
        """The model of the file that is there. Raises ConfigError; TrainError for somebody else's file."""
        config, source = load_config(self.path), Path(self.starter.source)
        path = config.models[self.name].path if self.name in config.models else None
        if path is None or path.resolve() != source.resolve():
            raise TrainError(
                f"{self.path} is there and has no model {self.name} at {source}, which is to be trained; "
                "name another directory with --out"
            )
        return config.of(self.name)

    def begin(self, kept: Kept, say: Say) -> None:
        """Write the file, or let the one that is there serve all that is made, if it says what this said."""
        self._write_beside(self.path.parent)
        if not self.path.exists():
            write_whole(self.path, self.text(Path(Path(self.starter.source).name)))
            say(f"wrote {self.path}: variants {', '.join(self.starter.serve)}")
            return
        text = self.path.read_text(encoding="utf-8")
        for before in (self._last(kept), self.starter):
            if (changed := self.starter.in_place_of(before, text)) is not None:
                write_whole(self.path, changed)
                say(f"going on with {self.path}")
                return
        say(f"going on with {self.path}, where somebody has changed what is served: that stays")

    def settle(self, kept: Kept, say: Say) -> ModelConfig:
        """Let the file say what is served of what was judged."""
        text = self.path.read_text(encoding="utf-8")
        config = load_config(self.path)
        if self.starter.in_place_of(self.starter, text) is not None:
            chosen = with_choice(self.starter, config, config.of(self.name), say)
            kept.put(SERVED, [list(chosen.serve), chosen.watched])  # first: so it is known as this one's
            write_whole(self.path, chosen.in_place_of(self.starter, text) or text)
        return load_config(self.path).of(self.name)

    def in_the_way(self) -> list[Path]:
        """What lies where files beside this one will, and is something else."""
        there = {self.path.with_name(name): text.encode() for name, text in self.beside.items()}
        return [
            path
            for path, text in there.items()
            if path.exists() and not (path.is_file() and path.read_bytes() == text)
        ]

    def _write_beside(self, directory: Path) -> None:
        for name, text in self.beside.items():
            write_whole(directory / name, text)

    def _last(self, kept: Kept) -> Starter:
        if (last := kept.get(SERVED)) is None:
            return self.starter
        return dataclasses.replace(self.starter, serve=tuple(last[0]), watched=bool(last[1]))


def trained_file(
    options: argparse.Namespace, base: Checkpoint, source: Path, more: tuple[str, ...], say: Say
) -> TrainedFile:
    """The file of what is trained from ``base`` and will lie in ``source``, with variants ``more`` beside
    what suits the machine. Raises what :func:`deploy.starting.arrive` does, DataError and ConfigError."""
    path = Path(options.out / FILE).absolute()
    starter = arrive(str(base.path), path.parent, say).starter
    _, model, config = base_of(options)
    lines, held_out, _ = lines_of(options, model, config)
    name = model_name(f"{options.role or options.data.stem}-{options.method}")
    whole = dataclasses.replace(
        starter, name=name, source=str(source.absolute()), is_hub=False, serve=(*starter.serve, *more)
    )
    roles, beside = _roles(options, held_out)
    calibration = model.calibration if model is not None else None
    if (conversations := calibrating(lines, base)) is not None:
        beside, calibration = {**beside, CALIBRATION: conversations}, Path(CALIBRATION)
    engines = path.parent / ENGINES
    python = starter.python or (engines if engines.exists() else None)
    settings = {
        "variants_dir": "variants",
        "roles": roles,
        "default_role": options.role or "default",
        **_shared(options, model, python),
    }
    return TrainedFile(path, whole, settings, calibration, beside)


def calibrating(lines: Sequence[Line], base: Checkpoint) -> str | None:
    """Of what is trained on, conversations for calibration, and prompts that ship, for the reference to
    answer: from the two a variant loses little of the role and no more than else of anything. None where too
    few of the lines are texts as the model's own template has them."""
    own, letters = list[list[Mapping[str, Any]]](), 0
    plain = [one for one in lines if one.is_plain and not any(map(_is_marked, one.messages))]
    for line in drawn(plain, MOST_LINES):
        own.append([{name: one[name] for name in ("role", "content")} for one in line.messages])
        letters += sum(len(one["content"]) for one in own[-1])
        if letters > MOST_LETTERS and len(own) >= LEAST_LINES:
            break
    if len(own) < LEAST_LINES:
        return None
    both = [*own, *shipped_prompts(base, len(own))]
    return "".join(json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in both)


def _is_marked(message: Mapping[str, Any]) -> bool:
    """Whether a message has a chat template's marks as text, which calibration refuses in most of them."""
    return TEMPLATE_MARK.search(message["content"]) is not None


def _roles(options: argparse.Namespace, held_out: Sequence[Line]) -> tuple[dict[str, Any], dict[str, str]]:
    """The role that was trained for, with what the configuration says of it; without one, a role of what was
    held out, and its items, by the name of their file."""
    if options.role is not None:
        said = _said(load_config(options.config).roles[options.role])
        return {options.role: {key: value for key, value in said.items() if key not in ELSEWHERE}}, {}
    texts = (as_item(line).model_dump_json(exclude_defaults=True) for line in held_out)
    return {"default": {"tasks": ITEMS}}, {ITEMS: "".join(f"{text}\n" for text in texts)}


def _shared(options: argparse.Namespace, model: ModelConfig | None, python: Path | None) -> dict[str, Any]:
    """What the configuration says of engines, of conversations and of the gateway's port; ``python`` is the
    engine environment's where it says none that is there."""
    sections: dict[str, dict[str, Any]] = {"gateway": {"cost": "memory_time"}, "engine": {}}
    if options.config.exists():
        config = load_config(options.config)
        engine = model.engine if model is not None else config.engine
        sections["engine"] = _said(engine)
        if engine.python is not None and not engine.python.exists():
            del sections["engine"]["python"]
        sections["conversations"] = _said(config.conversations)
        sections["gateway"] |= {k: v for k, v in _said(config.gateway).items() if k == "port"}
    if python is not None:
        sections["engine"].setdefault("python", str(python))
    return {name: section for name, section in sections.items() if section}


def _said(section: Any) -> dict[str, Any]:
    """What of a section somebody has set."""
    said = json.loads(section.model_dump_json(exclude_unset=True))
    return {key: value for key, value in said.items() if value not in (None, [], {})}


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)
