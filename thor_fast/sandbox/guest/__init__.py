"""What runs inside the jail, beside the snippet: standard library only, nothing of thor_fast.

Templates load these files from their paths (``bootstrap.py`` says how); nothing here is imported
by the rest of the package.
"""
