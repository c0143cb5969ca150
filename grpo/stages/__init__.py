"""Stages of training other than RL."""
