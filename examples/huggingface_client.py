"""Text and chat through huggingface_hub:   python examples/huggingface_client.py [http://localhost:8080]

Needs `pip install huggingface_hub`. API_KEY is sent if it is set; a server without a key ignores it.
"""

from __future__ import annotations

import os
import sys

from huggingface_hub import InferenceClient

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = InferenceClient(url, token=os.environ.get("API_KEY", "-"), timeout=120)

answer = client.text_generation("The capital of France is", max_new_tokens=16, details=True, return_full_text=False)
print("At once:", answer.generated_text)
assert answer.details is not None
print("Ended by:", answer.details.finish_reason, "after", answer.details.generated_tokens, "tokens")

print("Token by token:", end=" ")
for text in client.text_generation("The capital of France is", max_new_tokens=16, stream=True):
    print(text, end="", flush=True)
print()

question = [{"role": "user", "content": "What is the capital of France?"}]
chat = client.chat_completion(question, temperature=0, max_tokens=32)
print("Chat:", chat.choices[0].message.content)
