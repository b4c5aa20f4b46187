"""What `helm test` runs: is the gateway ready, and does every model answer a real request?"""

import json
import os
import ssl
import sys
import urllib.request
from typing import Any

URL, KEY = os.environ["TIERCEL_URL"], os.environ.get("TIERCEL_KEY")
MODELS = os.environ["TIERCEL_MODELS"].split()
# The certificate is of the name that clients use, not of the service.
UNCHECKED = ssl.create_default_context()
UNCHECKED.check_hostname = False
UNCHECKED.verify_mode = ssl.CERT_NONE


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
    """One request. Raises urllib.error.HTTPError for any answer but a 2xx."""
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    if KEY:
        request.add_header("authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request, timeout=120, context=UNCHECKED) as answer:
        print(path, answer.status, answer.headers.get("x-tiercel-variant") or "")
        found: dict[str, Any] = json.load(answer)
        return found


missing = ask("/readiness")["not_reachable"]
print("pools that cannot be reached:", missing or "none")
if KEY:
    usable = {entry["id"] for entry in ask("/v1/models")["data"]}
    asked = [model for model in MODELS if model in usable]
    for model in asked:
        message = {"role": "user", "content": "Say one word."}
        body = {"model": model, "max_tokens": 8, "messages": [message]}
        print(model, ask("/v1/chat/completions", body)["usage"])
    if not asked:
        sys.exit(f"the key may use none of {', '.join(MODELS)}; give tests.keySecret one that may")
else:
    print("no key (tests.keySecret.name), so no request was sent")
