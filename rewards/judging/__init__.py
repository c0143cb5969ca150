"""Judges: rubrics and verdicts, the model that gives them, how far it can be trusted."""
