"""What `helm test` runs: is the gateway ready, and does it answer a real request?"""

import json
import os
import ssl
import urllib.request

URL, MODEL, KEY = os.environ["TIERCEL_URL"], os.environ["TIERCEL_MODEL"], os.environ.get("TIERCEL_KEY")
# The certificate is of the name that clients use, not of the service.
UNCHECKED = ssl.create_default_context()
UNCHECKED.check_hostname = False
UNCHECKED.verify_mode = ssl.CERT_NONE


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """One request. Raises urllib.error.HTTPError for any answer but a 2xx."""
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    if KEY:
        request.add_header("authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request, timeout=120, context=UNCHECKED) as answer:
        print(path, answer.status, answer.headers.get("x-tiercel-variant") or "")
        found: dict[str, object] = json.load(answer)
        return found


missing = ask("/readiness")["not_reachable"]
print("pools that cannot be reached:", missing or "none")
if KEY:
    message = {"role": "user", "content": "Say one word."}
    print(ask("/v1/chat/completions", {"model": MODEL, "max_tokens": 8, "messages": [message]})["usage"])
else:
    print("no key (tests.keySecret.name), so no request was sent")
