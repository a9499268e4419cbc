"""Options of the routers of a model: how experts are scored, chosen, balanced and limited.

The defaults are the routers of CuMo. `CumoConfig.router` holds the options that differ from them; they hold
for all MoE layers of a model, in vision tower, connector and language model.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cumo_kernels.ops.capacity import DROPS
from cumo_kernels.ops.checks import check_bool, check_choice, shown
from cumo_kernels.ops.noise import check_share
from cumo_kernels.ops.scores import check_scoring

BESIDE_NOISE = ("noisy", "capacity_factor", "drop")  # options that noisy top-k has too
SCORING = ("score", "expert_groups", "top_groups", "group_score", "scale")  # arguments of route


@dataclass(frozen=True)
class RouterOptions:
    """How routers choose and weigh experts; names and values are those of `cumo_kernels.route`."""

    score: str = "softmax"  # or "sigmoid", "sqrtsoftplus"
    selection_bias: bool = False  # a bias that chooses but does not weigh, for balancing without a loss
    expert_groups: int = 1
    top_groups: int | None = None
    group_score: str = "max"
    scale: float = 1
    capacity_factor: float | None = None  # in training an expert keeps ceil(factor * T * K / E) slots
    drop: str = "position"
    jitter: float = 0
    noisy: bool = False  # noisy top-k with trainable noise (arXiv 1701.06538)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> "RouterOptions":
        """The options of a dict of those that differ from the defaults; None: the defaults.

        Raises:
            ValueError: a key is unknown, or a value is wrong whatever the number of experts is.
        """
        if isinstance(values, cls):
            values = asdict(values)
        if values is None:
            values = {}
        names = tuple(field.name for field in fields(cls))
        if not isinstance(values, Mapping):
            raise ValueError(f"router must be a dict of options or None, got {shown(values)}")
        if unknown := [key for key in values if key not in names]:
            raise ValueError(f"router must have keys among {', '.join(names)}, got {unknown[0]!r}")
        options = cls(**values)
        try:
            options._check()
        except ValueError as error:
            raise ValueError(f"router.{error}") from None
        return options

    def _check(self) -> None:
        check_bool("selection_bias", self.selection_bias)
        check_bool("noisy", self.noisy)
        check_choice("drop", self.drop, DROPS)
        check_share("jitter", self.jitter)
        factor = self.capacity_factor
        if factor is not None:
            if not isinstance(factor, numbers.Real) or isinstance(factor, bool):
                raise ValueError(f"capacity_factor must be a number or None, got {shown(factor)}")
            if not 0 < factor < math.inf:
                raise ValueError(f"capacity_factor must be finite and above 0, got {factor}")
        elif self.drop != DROPS[0]:
            raise ValueError(f"drop must be left out without router.capacity_factor, got {self.drop!r}")
        if self.noisy and (others := [name for name in self.changed() if name not in BESIDE_NOISE]):
            raise ValueError(f"noisy must be False with router.{others[0]}, got True")

    def check_experts(self, num_experts: int, top_k: int) -> None:
        """
        Raises:
            ValueError: the options do not fit this number of experts.
        """
        try:
            check_scoring(num_experts, top_k, *(getattr(self, name) for name in SCORING))
        except ValueError as error:
            raise ValueError(f"router.{error}") from None

    def changed(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        usual = RouterOptions()
        return {name: value for name, value in asdict(self).items() if value != getattr(usual, name)}

    def choosing(self) -> dict[str, Any]:
        """Keyword arguments of `route`, without the defaults."""
        return {name: value for name, value in self.changed().items() if name in SCORING}

    def weighing(self) -> dict[str, Any]:
        """Keyword arguments of `route` for experts that are chosen already."""
        return {name: value for name, value in self.choosing().items() if name in ("score", "scale")}

    def capacity(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Slots that an expert keeps (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961), at least one."""
        return max(1, math.ceil(self.capacity_factor * num_tokens * top_k / num_experts))
