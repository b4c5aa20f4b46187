"""Follows which version of every served variant is in use, and has a proven one taken over by its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from quantize.card import CARD_NAME, CURRENT, CardError, read_card
from quantize.versions import is_proven

LOOK_S = 1.0
"""Between two looks at all links."""

Say = Callable[[str], None]
TakeOver = Callable[[str, Path], Awaitable[None]]
"""Serves a version's directory as a ``model:variant``, or the one before again. Raises CardError."""


class Following:
    """One variant at a time is taken over, so that the others serve meanwhile.

    A version that was never proven is not taken over, which is said; it is once its gate has passed. Only a
    change counts: what an engine serves otherwise than the link says is somebody's purpose.
    """

    def __init__(self, served: Mapping[str, Path], take_over: TakeOver, say: Say) -> None:
        """``served``: ``model:variant`` to the directory of the version that its engine serves."""
        self._places = {variant: directory.parent for variant, directory in served.items()}
        self._seen = {variant: _chosen(place) for variant, place in self._places.items()}
        self._told: dict[str, tuple[Path, int]] = {}
        """Variant to a version that is not proven, and when its card was written."""
        self._take_over, self._say = take_over, say

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            for variant in self._places:
                try:
                    await self.look(variant)
                except Exception as error:  # which keeps no other from being followed
                    self._say(f"{variant}: what is in use now could not be taken over: {error}")

    async def look(self, variant: str) -> None:
        """Take over what is in use now, where that has changed and is proven."""
        place = self._places[variant]
        chosen = _chosen(place)
        if chosen is None or chosen == self._seen[variant]:
            return
        try:
            written = (chosen / CARD_NAME).stat().st_mtime_ns
            if self._told.get(variant) == (chosen, written):
                return
            card = read_card(chosen)
            if not is_proven(card):
                self._told[variant] = chosen, written
                why = f"broken: {card.engine_words}" if card.state == "broken" else "no gate has passed it"
                self._say(f"{variant}: {card.version} is in use now and not taken over, {why}")
                return
            self._seen[variant] = chosen
            self._say(f"{variant}: {card.version} is in use now; its engine takes it over")
            await self._take_over(variant, chosen)
        except (CardError, OSError) as error:
            self._seen[variant] = chosen
            self._say(f"{variant}: {chosen.name} is in use now and not taken over: {error}")
        self._seen[variant] = _chosen(place)  # a version that does not load has given way to the one before


def _chosen(place: Path) -> Path | None:
    """The directory that a variant's link names."""
    try:
        return place / (place / CURRENT).readlink()
    except OSError:
        return None
