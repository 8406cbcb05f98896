"""Guessed tokens, which the next step of the engine verifies, so that one step can give a row
several. `drafter` says what a drafter is; a row's own text and earlier outputs (suffix) and a
function of the caller's are drafters. A draft changes the time that a row takes, and never a token
of it. It imports sampling and decoders; only the engine asks drafters, and whoever loads a model
chooses one.
"""
