"""What every test stands on."""

from __future__ import annotations

import os

# LiteLLM fetches its price list from the net when it is imported, unless it is told not to.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
