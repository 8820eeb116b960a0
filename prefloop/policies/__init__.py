"""Hugging Face models as policies: load, score, sample, save."""

from prefloop.policies.loading import load_policy
from prefloop.policies.policy import Policy
from prefloop.policies.settings import Lora, Sampling

__all__ = ["Lora", "Policy", "Sampling", "load_policy"]
