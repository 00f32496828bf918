"""PEFT on models whose experts the kernel serves. See ``registration``; importing this does not import PEFT."""
