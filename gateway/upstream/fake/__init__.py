"""A stand-in for a vLLM engine, for tests and for trying the gateway without a model.

``python -m gateway.upstream.fake --port 8101`` runs one.
"""

from gateway.upstream.fake.account import Account, Work
from gateway.upstream.fake.engine import FakeEngine, listen
from gateway.upstream.fake.parts import TOKEN_P
from gateway.upstream.fake.script import Call, Script

__all__ = ["TOKEN_P", "Account", "Call", "FakeEngine", "Script", "Work", "listen"]
