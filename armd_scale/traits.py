"""The objectives at a glance. Imports nothing: configurations are read without torch."""

from typing import NamedTuple


class Traits(NamedTuple):
    """What the network, the plan and the tools must know of an objective."""

    label: str
    """Name in tables and pictures."""
    streams: int
    """Streams of the network: 2 (X and G, with prefix aggregation) or 1."""
    causal: bool
    """Whether a row sees the rows before it alone, or all rows."""
    mask: bool
    """Whether the vocabulary has a mask token behind it."""
    exact: bool
    """Whether the likelihood of a text is exact; else there is a bound of it."""
    phases: bool
    """Whether training passes through generation orders: the section ``orders`` applies, strided fine-tuning too."""
    settings: tuple[str, ...]
    """Fields of ``Decoding`` that choose how its texts are decoded."""

    @property
    def any_order(self) -> bool:
        """Whether tokens can be generated in any order; one causal stream goes left to right."""
        return self.streams == 2 or not self.causal


TRAITS = {
    "armd": Traits("ARMD", streams=2, causal=True, mask=False, exact=True, phases=True, settings=("streams", "draft")),
    "ar": Traits("AR", streams=1, causal=True, mask=False, exact=True, phases=False, settings=()),
    "mdm": Traits("MDM", streams=1, causal=False, mask=True, exact=False, phases=False, settings=("steps",)),
    "card": Traits("CARD", streams=1, causal=True, mask=True, exact=True, phases=False, settings=("block",)),
}
"""Traits by the name that ``objective`` takes in a configuration."""
DEFAULT = "armd"
"""What a configuration without ``objective`` trains; the project's own."""
