"""Policies that sample tokens: :mod:`.base` is the contract, every other module keeps it.

Nothing is imported here: :mod:`.paged` needs torch, the loop needs only :mod:`.base`.
"""
