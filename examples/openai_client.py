"""Chat through OpenAI's SDK:   python examples/openai_client.py [http://localhost:8080]

Needs `pip install openai`. API_KEY is sent if it is set; a server without a key ignores it.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = OpenAI(base_url=f"{url}/v1/", api_key=os.environ.get("API_KEY", "-"))

completion = client.chat.completions.create(
    model="",  # the server serves one model and takes any name
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    temperature=0,  # greedy; without it answers are sampled
    max_tokens=32,
)
print("At once:", completion.choices[0].message.content)

print("Token by token:", end=" ")
stream = client.chat.completions.create(
    model="",
    messages=[{"role": "user", "content": "Name three colours."}],
    temperature=0,
    max_tokens=32,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content, end="", flush=True)
print()
