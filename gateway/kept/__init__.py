"""Conversations that are kept by consent: redacted, encrypted, bounded.

What is asked in roles that agree to it becomes items (``tiercel tasks record``); with ``watch.reference:
batch`` answers wait here until the reference is started for them.
"""
