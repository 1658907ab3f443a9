"""Sampling videos and images from prompts, with references and loops."""

from opensora_fast.sampling.generate import Sample, SampleSettings, VideoGenerator
from opensora_fast.sampling.prompts import Prompt, parse_prompt, read_prompts
from opensora_fast.sampling.references import Placement, parse_mask_strategy, place_references

__all__ = [
    "Placement",
    "Prompt",
    "Sample",
    "SampleSettings",
    "VideoGenerator",
    "parse_mask_strategy",
    "parse_prompt",
    "place_references",
    "read_prompts",
]
