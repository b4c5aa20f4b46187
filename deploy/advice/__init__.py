"""``tiercel advise``: from a model, hardware and a goal to a technique, a budget and the next command.

Bytes are :mod:`quantize.core`'s, places :mod:`deploy.placement`'s, what a target serves
:mod:`quantize.core.legality`'s; what is decided here are rules (:mod:`deploy.advice.rules`), as data.
"""
