"""How answers are generated: their length, and greedy decoding or sampling."""

from dataclasses import dataclass
from typing import Any

NEW_TOKENS = 512
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures beyond which logits overflow or lose their order


@dataclass(frozen=True)
class Sampling:
    """Options of generation.

    Attributes:
        max_new_tokens: the longest answer in tokens; an answer also ends where the model's context is full.
        temperature: 0 for greedy decoding, otherwise the divisor of the logits.
        top_p: sample from the likeliest tokens whose probabilities sum to this; 1 for all tokens.
        seed: of the samples; None: another answer each time.

    Raises:
        ValueError: an option is out of its range.
    """

    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an int of at least 1, got {self.max_new_tokens!r}")
        if not _is_number(self.temperature) or not (
            self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST
        ):
            wanted = f"0, or from {COLDEST:g} to {HOTTEST:g}"
            raise ValueError(f"temperature must be {wanted}, got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be None or an int from 0 to 2**63 - 1, got {self.seed!r}")

    def for_generate(self) -> dict[str, Any]:
        """Keyword arguments of `generate`, but for max_new_tokens; they replace the generation config's."""
        if not self.temperature:
            return {"do_sample": False}
        # the generation config of transformers samples from 50 tokens if it does not say otherwise
        return {
            "do_sample": True,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": 0,
        }

    def for_endpoint(self) -> dict[str, Any]:
        """Fields of a request to an OpenAI-compatible endpoint."""
        fields = {"max_tokens": self.max_new_tokens, "temperature": float(self.temperature)}
        fields |= {"top_p": float(self.top_p)} if self.temperature else {}
        return fields | ({} if self.seed is None else {"seed": self.seed})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


GREEDY = Sampling()
