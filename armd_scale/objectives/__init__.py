"""Objectives: what is learned from a text, and how the model that learned it is scored and decoded.

An objective is a line of ``armd_scale.traits.TRAITS`` and the module of its name; ``interface`` says what the module
holds, and docs/explanation/objectives.md how to add one.
"""
