"""Shared by train.py, sample.py and explain.py; no need to read it to change the model."""
