"""Qwen3-VL: the blocks of Qwen3, dense or of experts, beside a vision tower."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from servesim.specs.families import vision
from servesim.specs.families.dense import QWEN3
from servesim.specs.families.moe import QWEN3_MOE
from servesim.specs.families.stack import standard

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.specs.families.reading import Fields
    from servesim.specs.families.stack import Stack, Style


def _with_tower(c: Fields, style: Style) -> Stack:
    stack = standard(c, style)
    if c.has("vision_config"):
        stack.vision += vision.qwen_vit(c.section("vision_config"))
    return stack


FAMILIES: dict[str, Callable[[Fields], Stack]] = {
    "qwen3_vl": partial(_with_tower, style=QWEN3),
    "qwen3_vl_text": partial(_with_tower, style=QWEN3),
    "qwen3_vl_moe": partial(_with_tower, style=QWEN3_MOE),
    "qwen3_vl_moe_text": partial(_with_tower, style=QWEN3_MOE),
}
