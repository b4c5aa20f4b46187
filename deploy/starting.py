"""``tiercel up MODEL``: from a checkpoint alone to a gateway that answers from variants that were judged.

The file is written first, and what it says is done: the reference answers the conversations that ship with
the product, the variants are made, measured and judged. Then the file says what is served, unless somebody
has changed it. What was finished is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.children import end_with_parent, own_environment
from deploy.commands import run_engines
from deploy.engine import EngineSpec, need_of
from deploy.evaluation import evaluate_models
from deploy.fleet.room import too_large
from deploy.gateway_process import UpError
from deploy.machine import look
from deploy.models import checkpoint_of, registry_of
from deploy.placement import GIB, Machine, Need, PlacementError, arranged, taken_by
from deploy.ports import why_not
from deploy.served import who_serves
from deploy.starter import FILE, REFERENCE, ROLES, Choice, Starter, candidates, choose, model_name
from deploy.unlabelled import ask_reference, is_answered, variant_engine
from gateway.config import Config, ModelConfig, load_config, parse_config
from gateway.routing.ladders import costs
from quantize.card import Card, CardError, read_card
from quantize.check import refuse_unfit
from quantize.core.checkpoint import Checkpoint
from quantize.core.files import held, write_whole
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import uniform
from quantize.core.recipes import RECIPES
from quantize.core.targets import detect, target

Say = Callable[[str], None]

ENGINES = Path(".venv-engine/bin/python")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Arrived:
    """A checkpoint that somebody came with."""

    starter: Starter
    checkpoint: Checkpoint
    modules: Modules


def arrive(source: str, beside: Path, say: Say) -> Arrived:
    """Look at what ``source`` is, a directory or a hub's id, and at what this machine's engine takes of it.

    ``beside`` is where the configuration will lie. Raises CheckpointError, TargetError and UpError.
    """
    where, path = target(detect()), Path(source).expanduser()
    python = engine_python(beside)
    if path.is_dir():
        starter = Starter(model_name(path.absolute()), str(path.absolute()), False, where.name, (REFERENCE,))
    elif not path.exists() and _HUB_ID.fullmatch(source):
        starter = Starter(model_name(source), source, True, where.name, (REFERENCE,))
    else:
        why = "is a file" if path.exists() else "does not exist"
        raise UpError(
            f"{source} {why}; give the directory of a checkpoint (config.json, safetensors and a tokenizer), "
            "or a hub's OWNER/NAME"
        )
    model = parse_config(starter.text(), str(FILE), beside).each()[0]
    checkpoint = checkpoint_of(model, say)
    refuse_unfit(checkpoint)
    modules = read_modules(checkpoint)
    suited, left_out = candidates(modules, checkpoint.head_dim, where)
    starter = dataclasses.replace(starter, serve=(REFERENCE, *suited), left_out=left_out, python=python)
    return Arrived(starter, checkpoint, modules)


def engine_python(beside: Path) -> Path | None:
    """The engine environment's interpreter, of those next to the product; None where the configuration finds
    it by itself, or nobody does."""
    if (beside / ENGINES).exists():
        return None
    product = Path(sys.prefix).parent, Path(__file__).absolute().parents[1]
    return next((place / ENGINES for place in product if (place / ENGINES).exists()), None)


def known_model(config: Config, source: str, path: Path) -> ModelConfig:
    """The model of a configuration that is there already. Raises UpError where it is not in it."""
    given = Path(source).expanduser().absolute()
    for model in config.each():
        if source in (model.name, model.hub) or (model.hub is None and model.path == given):
            return model
    raise UpError(
        f"{path} is there and has no model at {source}, but {', '.join(config.models)}; serve it with "
        "`tiercel up`, add the model to it, or name another file with --config"
    )


def refuse_before_work(config: Config, model: ModelConfig) -> None:
    """Raise UpError for what would stop everything at its end: no engine, a port that is taken."""
    python, gateway = model.engine.python, config.gateway
    if python is None or not python.exists():
        raise UpError(f"no engine environment at {python}; run `make setup`, or set engine.python")
    wanted = {"gateway.port": (gateway.host, [gateway.port])}
    wanted["engine.base_port"] = (model.engine.host, sorted(model.ports.values()))
    for key, (host, ports) in wanted.items():
        for port in ports:
            if why := why_not(host, port, key):
                raise UpError(why)


def refuse_too_large(model: ModelConfig, arrived: Arrived, machine: Machine) -> None:
    """Raise PlacementError where the reference's engine has no room: by how much, and what would have."""
    sizes = {REFERENCE: uniform(arrived.modules, "bf16").weight_bytes(arrived.modules)}
    where = target(arrived.starter.target)
    for name in arrived.starter.serve[1:]:
        sizes[name] = RECIPES[name].plan(arrived.modules, where).weight_bytes(arrived.modules)
    needs = {name: _need(model, arrived.checkpoint, name, size) for name, size in sizes.items()}
    refused = too_large(machine, list(needs.values()))
    if (why := refused.get(needs[REFERENCE].name)) is None:
        return
    fits = [name for name, need in needs.items() if need.name not in refused]
    text = ", ".join(f"{name} ({taken_by(needs[name]) / GIB:.1f} GiB in all)" for name in fits)
    smaller = (
        f"In {text} it would fit, but only what the 16-bit model answers shows what that loses: make and "
        "judge it where the 16-bit model fits, and take its variants_dir along"
        if fits
        else "It fits in no precision that this machine serves"
    )
    raise PlacementError(f"{why}. {smaller}")


def room_note(arrived: Arrived, path: Path) -> str:
    """Why this machine has no room for the model, or an empty string."""
    try:
        refuse_too_large(load_config(path).each()[0], arrived, look())
    except PlacementError as error:
        return f"not on this machine: {error}"
    return ""


def _need(model: ModelConfig, checkpoint: Checkpoint, variant: str, weight_bytes: int) -> Need:
    per_token = checkpoint.kv_bytes_per_token(2)
    config = checkpoint.text_config
    heads = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    return Need(
        name=model.id(variant),
        weight_bytes=weight_bytes,
        kv_bytes=model.engine.kv_bytes(checkpoint.max_model_len, per_token),
        heads=tuple(int(count) for count in heads if count),
        token_bytes=per_token,
        context=model.engine.context(checkpoint.max_model_len, per_token),
    )


def is_judged(model: ModelConfig) -> bool:
    """Whether every variant that the file names has been judged for every role, or cannot be loaded."""
    registry = registry_of(model)
    for variant in model.serve:
        try:
            card = read_card(registry.path(variant))
        except CardError:
            return False
        if card.state == "ready" and not (card.evaluation and card.gate.keys() >= model.roles.keys()):
            return False
    return True


async def prepare(config: Config, path: Path, model: ModelConfig, say: Say) -> list[Card]:
    """Have the reference answer, make the variants that the file names, measure and judge them."""
    registry = registry_of(model, say)
    async with contextlib.AsyncExitStack() as stack:
        lock = model.variants_dir / ".locks" / ".up"
        await stack.enter_async_context(held(lock, f"making and judging {model.name}", say))
        reference = await asyncio.to_thread(registry.add_reference, checkpoint_of(model, say))
        engines: dict[str, EngineSpec] = {}
        if not look().gpus and not is_answered(model):
            # On a CPU it stays for its own measurement; on a GPU it would take the memory of what is made.
            spec = await stack.enter_async_context(variant_engine(model, reference, say))
            engines[reference.id] = spec
        await ask_reference(model, say, engines, to_calibrate=True)
        await make_apart(path, model)
        made = [name for name in model.serve if name in registry.variants()]
        cards = [await asyncio.to_thread(registry.card, name) for name in made]
        others = [card for card in cards if card.variant != reference.variant]
        return await evaluate_models(config, {model.name: [reference, *others]}, say, engines)


async def make_apart(path: Path, model: ModelConfig) -> None:
    """Make what is missing in a process of its own, which can be stopped at any time and leaves no memory
    taken. Raises UpError."""
    wanted = [name for name in model.serve if name in RECIPES]
    if not wanted:
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "quantize", "make", "--no-evaluate"),
        *("--config", str(path), "--model", model.name, *wanted),
        stdout=asyncio.subprocess.DEVNULL,
        env=own_environment(),
        start_new_session=True,  # the terminal's Ctrl-C is this process's to deal with
        preexec_fn=end_with_parent(),
    )
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if status:
        raise UpError("the variants could not be made; the reason stands above")


def settle(config: Config, path: Path, model: ModelConfig, arrived: Arrived, say: Say) -> Config:
    """Let the file say what is served of what was judged; where somebody has said that already, it stays."""
    text = path.read_text(encoding="utf-8")
    if arrived.starter.in_place_of(arrived.starter, text) is None:
        return config
    chosen = with_choice(arrived.starter, config, model, say)
    write_whole(path, chosen.in_place_of(arrived.starter, text) or text)
    return load_config(path)


def with_choice(starter: Starter, config: Config, model: ModelConfig, say: Say) -> Starter:
    """The starter with what the roles need of the variants that ``model`` serves and that were judged."""
    choice = _fitting_choice(config, model, say)
    return dataclasses.replace(starter, serve=choice.serve, watched=choice.watched)


def _fitting_choice(config: Config, model: ModelConfig, say: Say) -> Choice:
    """The choice, and the reference alone where what was chosen has no room beside it."""
    registry = registry_of(model)
    cards = {name: read_card(registry.path(name)) for name in model.serve if name in registry.variants()}
    ready = {name: card for name, card in cards.items() if card.state == "ready"}
    passed = {role: [name for name, card in ready.items() if role in card.passed] for role in model.roles}
    choice = choose(passed, costs(ready, config.gateway.cost), model.reference)
    needs = [need_of(ready[name], registry.path(name), model.engine) for name in choice.serve]
    if arranged(look(), needs) is None and len(needs) > 1:
        without = ", ".join(choice.serve[1:])
        say(
            f"{without} would have no room beside {model.reference}, which some role needs, and is not served"
        )
        return Choice((model.reference,), dict.fromkeys(model.roles, model.reference), watched=False)
    return choice


def bring_up(source: str, path: Path, say: Say) -> None:
    """Everything up to serving: the file, the variants, their verdicts."""
    began = time.monotonic()
    if path.exists():
        known_model(load_config(path), source, path)
    arrived = arrive(source, path.absolute().parent, say)
    for name, why in arrived.starter.left_out.items():
        say(f"{name} is left out: {why}")
    if path.exists():
        say(f"going on with {path}, which is there")
    else:
        write_whole(path, arrived.starter.text())
        say(f"wrote {path}: variants {', '.join(arrived.starter.serve)}, roles {', '.join(ROLES)}")
    config = load_config(path)
    model = known_model(config, source, path)
    refuse_before_work(config, model)
    if not is_judged(model):
        refuse_too_large(model, arrived, look())
        run_engines(prepare(config, path, model, say))
    config = settle(config, path, model, arrived, say)
    model = config.of(model.name)
    registry = registry_of(model)
    cards = [read_card(registry.path(name)) for name in registry.variants()]
    seconds = time.monotonic() - began
    say(f"\n{who_serves(config, model, cards)}\n\n{path} says so, after {seconds:.0f} s; now it is served")
