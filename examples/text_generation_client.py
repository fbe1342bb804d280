"""Text through TGI's own client:   python examples/text_generation_client.py [http://localhost:8080]

Needs `pip install text-generation` in an environment without pytgi: the client (0.7) wants huggingface_hub before 1.0,
pytgi a newer one. API_KEY is sent if it is set; a server without a key ignores it.
"""

from __future__ import annotations

import os
import sys

from text_generation import Client

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = Client(url, headers={"Authorization": f"Bearer {os.environ.get('API_KEY', '-')}"}, timeout=120)

answer = client.generate("The capital of France is", max_new_tokens=16)
print("At once:", answer.generated_text)
print("Ended by:", answer.details.finish_reason.value, "after", answer.details.generated_tokens, "tokens")

print("Token by token:", end=" ")
for response in client.generate_stream("The capital of France is", max_new_tokens=16):
    if not response.token.special:
        print(response.token.text, end="", flush=True)
print()
