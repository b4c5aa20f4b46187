"""Whole runs on tiny models: adapters, all weights, merging, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.tensors import read_file_parts, read_parts, same_bytes
from quantize.evaluate.tasks import Item
from quantize.train import loop
from quantize.train import run as running
from quantize.train.adapters import Lora, changes
from quantize.train.answers import judge
from quantize.train.base import load_base
from quantize.train.data import Line, encode, of_item
from quantize.train.loop import Settings, TrainError
from quantize.train.merge import merge, record_of
from quantize.train.run import Job, run
from tests.quantize.tiny import change_config, make_checkpoint

INTENTS = ("translate", "transfer", "timer")


def _say(_text: str) -> None:
    pass


def _items(first: int, count: int) -> list[Line]:
    found = []
    for number in range(first, first + count):
        intent = INTENTS[number % 3]
        messages = ({"role": "user", "content": f"please {intent[:4]} {number}"},)
        found.append(of_item(Item(messages=messages, expected=intent), f"items:{number}"))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


def _job(base: Path, out: Path, method: Any = "lora", **more: Any) -> Job:
    checkpoint = open_checkpoint(base)
    settings = Settings(steps=12, learning_rate=0.01, batch=6, together=3, keep_every=4)
    given: dict[str, Any] = {"lora": Lora(rank=4, alpha=8), "device": "cpu"}
    return Job(
        method,
        checkpoint,
        encode(_items(0, 24), checkpoint, 64),
        encode(_items(100, 9), checkpoint, 64),
        settings,
        out,
        **{**given, **more},
    )


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished."""
    out = tmp_path_factory.mktemp("run")
    run(_job(base, out), _say)
    return out


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    return found


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_training_learns_what_it_is_shown(base: Path, tmp_path: Path, method: str) -> None:
    rate = 2e-3 if method == "full" else 0.01
    job = _job(base, tmp_path, method)
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, steps=40, learning_rate=rate))
    record = run(job, _say)
    assert record.held_out.loss_after < 0.85 * record.held_out.loss_before
    assert record.held_out.right.good > record.held_out.right.reference_good
    assert len(record.curve) == 40
    assert record.data.examples == 24
    assert record.memory.measured is not None


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_killed_run_ends_with_the_same_files(
    base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"lora": Lora(rank=4, alpha=8, dropout=0.2)}
    run(_job(base, tmp_path / "whole", method, **more), _say)
    steps = 0

    def killed(self: Any, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise SystemExit
        return step(self, *given)

    step = loop._Run.step
    monkeypatch.setattr(loop._Run, "step", killed)
    with pytest.raises(SystemExit):
        run(_job(base, tmp_path / "again", method, **more), _say)
    monkeypatch.setattr(loop._Run, "step", step)
    run(_job(base, tmp_path / "again", method, **more), _say)
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_done_again(base: Path, adapter: Path) -> None:
    said: list[str] = []
    record = run(_job(base, adapter), said.append)
    assert said == [f"{adapter}: finished before, with the same model, data and settings"]
    assert record.method == "lora"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora": Lora(rank=2)}, "with other lora"),
        ({"method": "qlora"}, "with other method"),
    ],
)
def test_a_directory_of_another_run_is_refused(
    base: Path, adapter: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainError, match=said):
        run(_job(base, adapter, **more), _say)


def test_other_data_are_another_run(base: Path, adapter: Path) -> None:
    job = _job(base, adapter)
    other = dataclasses.replace(job, examples=encode(_items(0, 12), job.checkpoint, 64))
    with pytest.raises(TrainError, match="with other data"):
        run(other, _say)


def test_peft_reads_the_adapter_and_says_what_the_merged_model_says(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge(open_checkpoint(base), adapter / "adapter", tmp_path / "merged", record_of(adapter / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = _logits(plain)
    theirs = _logits(PeftModel.from_pretrained(plain, adapter / "adapter"))
    ours = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    changed = float((theirs - before).norm())
    assert changed > 0
    assert float((ours - theirs).norm()) < 0.1 * changed


def test_a_merged_model_is_the_base_in_all_else_byte_for_byte(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(base)
    merge(checkpoint, adapter / "adapter", tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    for file in checkpoint.files:
        if file.suffix != ".safetensors":
            assert (merged.path / file).read_bytes() == (base / file).read_bytes()
    trained = {f"{change.module}.weight" for change in changes(adapter / "adapter")}
    before, after = read_parts(base), read_parts(merged.path)
    assert before.keys() == after.keys()
    assert trained == {f"{linear.name}.weight" for linear in read_modules(checkpoint).linears}
    for name, part in before.items():
        assert part.dtype == after[name].dtype
        assert same_bytes(part, after[name]) == (name not in trained)


def test_a_fully_trained_model_is_in_the_bases_types_with_its_tokenizer(base: Path, tmp_path: Path) -> None:
    run(_job(base, tmp_path, "full"), _say)
    made = open_checkpoint(tmp_path / "model")
    assert made.dtype == "BF16"
    assert (made.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    before, after = read_parts(base), read_parts(made.path)
    assert {name: part.shape for name, part in before.items()} == {n: part.shape for n, part in after.items()}
    assert not same_bytes(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_tied_embeddings_are_trained_once_and_stay_tied(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    run(_job(tied, tmp_path / "run", "full"), _say)
    assert "lm_head.weight" not in read_parts(tmp_path / "run" / "model")


def test_gradient_checkpointing_changes_memory_and_nothing_else(base: Path, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        out = tmp_path / str(on)
        run(_job(base, out, "qlora", checkpointing=on), _say)
        found.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_base_of_an_adapter_does_not_change_while_it_trains(base: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run(_job(base, tmp_path, "qlora"), _say)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma3_text", "phi3"])
def test_models_of_other_architectures_are_trained_as_well(tmp_path: Path, architecture: str) -> None:
    other = make_checkpoint(tmp_path / "other", architecture)
    record = run(_job(other, tmp_path / "run", "qlora"), _say)
    assert record.held_out.loss_after < record.held_out.loss_before
    merge(open_checkpoint(other), tmp_path / "run" / "adapter", tmp_path / "merged")


def test_a_budget_that_will_not_do_is_refused_with_the_numbers(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainError, match=r"--memory 0\.001: 0\.\d+ GB are needed .*trained .*try lora or qlora"
    ):
        run(_job(base, tmp_path, "full", memory=0.001), _say)
    assert not list(tmp_path.iterdir())


def test_without_a_budget_what_is_free_is_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_free", lambda _job: 1_000_000)
    with pytest.raises(TrainError, match=r"GB are needed .* 0\.0 GB are free; try lora or qlora.*--memory"):
        run(_job(base, tmp_path, "full"), _say)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_trained_is_refused_before_work(base: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    change_config(quantized, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(TrainError, match=r"is quantized already.*give the 16-bit checkpoint"):
        run(_job(quantized, tmp_path / "run"), _say)
    experts = make_checkpoint(tmp_path / "experts", "mixtral")
    with pytest.raises(TrainError, match="has experts"):
        run(_job(experts, tmp_path / "run"), _say)
    with pytest.raises(TrainError, match=r"targets: 'c_attn' is no linear module; known: down_proj"):
        run(_job(base, tmp_path / "run", lora=Lora(targets=("c_attn",))), _say)


def _copy(base: Path, to: Path) -> Checkpoint:
    shutil.copytree(base, to)
    return open_checkpoint(to)


def test_an_adapter_is_not_merged_into_what_it_was_not_trained_on(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    record, files = record_of(adapter / "adapter"), adapter / "adapter"
    other = make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(TrainError, match="is not the base that the adapter was trained on"):
        merge(open_checkpoint(other), files, tmp_path / "out", record)
    wide = make_checkpoint(tmp_path / "wide", intermediate_size=384)
    with pytest.raises(TrainError, match="it is an adapter of another model"):
        merge(open_checkpoint(wide), files, tmp_path / "out")
    changed = _copy(base, tmp_path / "changed")
    text = (changed.path / "chat_template.jinja").read_text(encoding="utf-8")
    (changed.path / "chat_template.jinja").write_text(f"{text} ", encoding="utf-8")
    with pytest.raises(
        TrainError, match="tokenizer or chat template has changed since the adapter was trained"
    ):
        merge(changed, files, tmp_path / "out", record)
    (tmp_path / "there").mkdir()
    with pytest.raises(TrainError, match="is there already"):
        merge(open_checkpoint(base), files, tmp_path / "there", record)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"use_dora": True}, "use_dora is not served"),
        ({"peft_type": "IA3"}, "peft_type IA3 is not served"),
        ({"bias": "all"}, "bias all is not served"),
        ({"lora_bias": True}, "lora_bias is not served"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is not served"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes the base"),
        ({"r": 0}, "r: 0; must be a number above 0"),
        ({"r": "16"}, "r: '16'; must be"),
        ({"r": True}, "r: True; must be"),
        ({"lora_alpha": "x"}, "lora_alpha: 'x'; must be"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan; must be"),
        ({"target_modules": 5}, "target_modules: 5; must be names"),
        ({"target_modules": ["q_proj", 1]}, "target_modules: .*must be names"),
    ],
)
def test_adapters_of_other_kinds_or_of_no_size_are_refused(
    base: Path, adapter: Path, tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}), encoding="utf-8")
    with pytest.raises(TrainError, match=said):
        merge(open_checkpoint(base), tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # PEFT's, of what it saves
@pytest.mark.parametrize(
    ("targets", "more", "lost"),
    [
        (["q_proj"], {"lora_bias": True}, r"q_proj\.lora_B\.bias"),
        (["q_proj", "embed_tokens"], {}, r"embed_tokens\.lora_embedding_A"),
        (["q_proj"], {"trainable_token_indices": [5, 9]}, "embed_tokens.*trainable_tokens_delta"),
        (["q_proj"], {"embeddings": True}, r"model\.embed_tokens\.weight"),
    ],
)
def test_an_adapter_of_which_a_part_would_be_lost_is_refused_by_its_first_tensor(
    base: Path, tmp_path: Path, targets: list[str], more: dict[str, Any], lost: str
) -> None:
    _theirs(base, tmp_path / "adapter", targets, **more)
    config = tmp_path / "adapter" / "adapter_config.json"
    plain = {"lora_bias": False, "trainable_token_indices": None}
    config.write_text(json.dumps({**json.loads(config.read_text()), **plain}), encoding="utf-8")
    with pytest.raises(TrainError, match=r"adapter_model\.safetensors: base_model\.model\.\S+ is not served"):
        changes(tmp_path / "adapter")
    with pytest.raises(TrainError, match=rf"{lost}\S* is not served or merged here, and would be lost"):
        merge(open_checkpoint(base), tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.filterwarnings("ignore")
def test_a_weight_of_the_base_beside_an_adapter_may_be_there_as_it_was(base: Path, tmp_path: Path) -> None:
    """PEFT saves the head's own weight where the head is among the targets."""
    _theirs(base, tmp_path / "adapter", ["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in read_file_parts(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )
    merge(open_checkpoint(base), tmp_path / "adapter", tmp_path / "merged")
    before, after = read_parts(base), read_parts(tmp_path / "merged")
    assert not same_bytes(before["lm_head.weight"], after["lm_head.weight"])


def _theirs(base: Path, out: Path, targets: list[str], embeddings: bool = False, **more: Any) -> None:
    """An adapter as PEFT writes it, also with ``embeddings`` that were trained, as of new tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or (embeddings and "embed_tokens" in name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out, save_embedding_layers=True if embeddings else "auto")


def test_a_cut_adapter_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        TrainError, match=r"adapter_model\.safetensors cannot be read .*copy the adapter again"
    ):
        merge(open_checkpoint(base), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_end_where_those_that_were_not_cut_end(base: Path) -> None:
    from quantize.core.tokenizer import load_tokenizer

    ended = []

    class Writer:
        training = False

        def eval(self) -> None:
            pass

        def train(self, _mode: bool) -> None:
            pass

        def __call__(self, input_ids: Any, logits_to_keep: Any, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(len(input_ids), len(logits_to_keep), 2048))

        def generate(self, input_ids: Any, eos_token_id: Any, **_: Any) -> Any:
            ended.append(eos_token_id)
            return input_ids

    asked = ({"role": "user", "content": "hello"},)
    lines = [
        of_item(Item(messages=asked, expected=said, check="contains", facts=("x",), max_tokens=6), said)
        for said in ("x", "x and so on, " * 5)
    ]
    checkpoint, tokenizer = open_checkpoint(base), load_tokenizer(base)
    first = len(encode(lines[:1], checkpoint, 64).examples[0].ids)
    for chosen, length in ((lines, first + 2), (lines[1:], first)):
        held_out = encode(chosen, checkpoint, length)
        assert held_out.cut == 1
        judge(Writer(), held_out.examples, tokenizer, torch.device("cpu"), 1000)
    assert ended == [[tokenizer.eos_token_id]] * 3


def test_an_answer_is_right_exactly_where_it_is_what_the_model_writes(base: Path) -> None:
    from quantize.core.tokenizer import load_tokenizer

    loaded = load_base(open_checkpoint(base), "full", "cpu")
    tokenizer, model = load_tokenizer(base), loaded.model.eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    said = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    asked = ({"role": "user", "content": "hello"},)
    items = [
        Item(messages=asked, expected=said or "x", check="contains", facts=(said[:3],), max_tokens=6),
        Item(messages=asked, expected="never", check="contains", facts=("never",), max_tokens=6),
        Item(messages=asked, expected="never"),
    ]
    lines = [of_item(item, str(number)) for number, item in enumerate(items)]
    examples = encode(lines, open_checkpoint(base), 64).examples
    found = judge(model, examples, tokenizer, torch.device("cpu"), 512)
    assert found.right == (True, False, False)
