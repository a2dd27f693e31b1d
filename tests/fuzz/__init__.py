"""A campaign of hostile inputs: seven targets, each a strategy of inputs and a check of what becomes of one.

python -m tests.fuzz --minutes 30
"""
