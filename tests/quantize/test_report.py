"""The report is one page that asks nobody for anything and says what the cards say."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantize.card import Card, Outcome, Verdict
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.plan.controls import Compared, Controls
from quantize.report.distributions import compute_distributions
from quantize.report.report import Report, render_report, write_report
from quantize.report.tables import format_card, format_comparison, format_variants
from tests.quantize.small import make_evaluation, write_base

BASE = {
    "model": "assistant",
    "reference": "bf16",
    "method": "gptq",
    "kv_bytes_per_token": 2048,
    "max_model_len": 1024,
    "versions": {"llmcompressor": "0.14"},
    "created": "2026-11-20",
    "module_bits": {},
}


def make_card(variant: str, scheme: str, bits: int, size: int, **fields: object) -> Card:
    made = {
        "variant": variant,
        "scheme": scheme,
        "weight_bits": bits,
        "weight_bytes": size,
        "files": {"a": variant},
    }
    return Card.model_validate(BASE | made | fields)


GATE = {"core": Verdict(outcome=Outcome.FAILED, reasons=('drop of 2 points < "budget" & more',))}
CARDS = (
    make_card("bf16", "bfloat16", 16, 8_390_000),
    make_card(
        "int4",
        "w4a16-g64",
        4,
        3_780_000,
        bits_per_weight=4.25,
        schemes={"model.layers.0.mlp.down_proj": "w4a16-g64"},
        evaluation=make_evaluation(0.0111),
        gate=GATE,
    ),
    make_card(
        "planned",
        "mixed",
        4,
        4_120_000,
        schemes={"model.layers.0.mlp.down_proj": "w8a8", "model.layers.1.mlp.down_proj": "w4a16-g64"},
        evaluation=make_evaluation(0.0035),
        predicted_kl=0.0033,
        target="vllm-cpu",
    ),
    make_card("odd", "w4a16", 4, 3_000_000, state="broken", engine_words="<ValueError> size 48"),
)


@dataclass(frozen=True)
class Row:
    group: str
    kind: str
    layer: int
    scheme: str
    kl: float | None
    fisher: float | None


CONTROLS = Controls(
    variant="int4",
    version="0" * 12,
    measured_on="held-out conversations of the roles",
    conversations=10,
    tokens=900,
    rows=(
        Compared(label="int4", kind="planned", bytes=3_780_000, bits=4.25, kl=0.006, half=0.001),
        Compared(
            label="random plan",
            kind="random",
            bytes=3_770_000,
            bits=4.24,
            kl=0.01,
            half=0.002,
            ratio=0.6,
            low=0.5,
            high=0.7,
        ),
    ),
)
ROWS = tuple(
    Row(f"model.layers.{layer}.{kind}", kind, layer, scheme, kl / (layer + 1), None)
    for layer in (0, 1)
    for kind in ("self_attn.qkv_proj", "mlp.down_proj")
    for scheme, kl in (("w4a16-g64", 0.002), ("w8a8", 0.00004))
)


class Page(HTMLParser):
    """Tags that do not close, addresses, table heads without scope, pictures without words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.unscoped = self.wordless = self.pictures = 0
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag not in ("meta", "path", "line", "circle", "br"):
            self.open.append(tag)
        self.addresses += [str(found[name]) for name in ("src", "href") if name in found]
        self.ids |= {str(found["id"])} if "id" in found else set()
        self.unscoped += tag == "th" and "scope" not in found
        self.pictures += tag == "svg"
        self.wordless += tag == "svg" and not found.get("aria-label")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "line", "circle"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    base = open_checkpoint(write_base(tmp_path_factory.mktemp("base")))
    modules = read_modules(base)
    figures = compute_distributions(base, modules, base.path, {}, variant="int4", version="0" * 12)
    report = Report(
        "assistant",
        CARDS,
        controls=CONTROLS,
        sensitivity=ROWS,
        distributions={"int4": figures},
        kept=["embeddings: 8 MB"],
    )
    return Page(render_report(report))


def test_the_page_is_whole_and_needs_nothing_else(page: Page) -> None:
    assert page.open == []
    assert {address[0] for address in page.addresses} == {"#"}
    assert (
        {address[1:] for address in page.addresses} == {f"int4-layer-{layer}" for layer in (0, 1)} <= page.ids
    )
    assert page.pictures == 2 + 2 + 2 * 4  # front, controls; wide, narrow; modules
    assert (page.unscoped, page.wordless) == (0, 0)


def test_the_page_says_what_the_cards_say(page: Page) -> None:
    for words in (
        "at least 0.0111 (0.00999 to 0.0122)",
        "grounded: 97.5 % (95.5 to 98.6), reference 98.0 %",
        "90.0 % (86.7 to 92.6)",
        'drop of 2 points < "budget" & more',
        "✕ failed",
        "broken: <ValueError> size 48",
        "noise floor",
        "int4 and its controls",
        "random plan",
        "0.60 (0.50 to 0.70)",
        "vllm 0.32.0, instructions avx512f, machine x86_64",
        "scales included. Embeddings: 8 MB.",
    ):
        assert words in page.text


def test_cells_of_the_heat_map_hold_their_loss_and_darken_with_it() -> None:
    text = render_report(Report("assistant", CARDS[:1], sensitivity=ROWS))
    cells = re.findall(r"var\(--hot\) (\d+)%, var\(--card\)\)\">([\d.e-]+)</td>", text)
    assert [value for _, value in cells] == ["2", "2", "1", "1", "0.04", "0.04", "0.02", "0.02"]
    shades = [int(shade) for shade, _ in cells]
    assert shades == sorted(shades, reverse=True)
    assert shades[0] > shades[2] > shades[4] > shades[6]


def test_a_report_of_bare_cards_has_no_empty_sections(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "variants.html"
    write_report(Report("assistant", CARDS[:1]), path)
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Variants", "What was measured where"]
    assert [entry.name for entry in path.parent.iterdir()] == ["variants.html"]
    with pytest.raises(ValueError, match="at least one variant"):
        render_report(Report("assistant", ()))


def test_the_terminal_shows_the_same() -> None:
    listing = format_variants(CARDS, {"int4": 3}).splitlines()
    assert len(listing) == 1 + len(CARDS)
    assert re.search(
        r"int4 .* \(of 3\) .* 3\.78 MB +4\.25 .* 0\.0111 +FAIL, 90\.0 % right +ready", listing[2]
    )
    compared = format_comparison(CARDS[1:3])
    assert re.search(r"mean KL +at least 0\.0111 \(.*\) +at least 0\.0035", compared)
    assert re.search(r"model\.layers\.0\.mlp\.down_proj +w4a16-g64 +w8a8", compared)
    shown = format_card(CARDS[2], ("1" * 12, CARDS[2].version))
    assert "checked for         vllm-cpu" in shown
    assert f"{CARDS[2].version} (this one)" in shown
    assert re.search(r"model\.layers\.1\.mlp\.down_proj +w4a16-g64 +gptq", shown)


def test_distributions_of_the_base_itself_show_no_change(tmp_path: Path) -> None:
    base = open_checkpoint(write_base(tmp_path))
    figures = compute_distributions(base, read_modules(base), base.path, {})
    assert len(figures.groups) == 8
    assert {group.weights.relative_error for group in figures.groups} == {0.0}
    for group in figures.groups:
        assert group.weights.before == group.weights.after
        assert sum(group.weights.before) == pytest.approx(1, abs=0.01)
        assert group.activations is None
