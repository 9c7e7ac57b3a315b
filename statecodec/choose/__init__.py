"""Which codec each tensor gets: ordered rules, and the presets."""

from statecodec.choose.presets import PRESETS, Preset, preset
from statecodec.choose.rules import Policy, Rule, load_rules, parse_rule

__all__ = ["PRESETS", "Policy", "Preset", "Rule", "load_rules", "parse_rule", "preset"]
