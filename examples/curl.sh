#!/usr/bin/env bash
# The routes of the server with curl:   bash examples/curl.sh [http://localhost:8080]
# API_KEY=... sends a key; a server without one ignores it.
set -euo pipefail

url=${1:-http://localhost:8080}

# Any status but 2xx ends the script, with the server's own words on the screen.
ask() {
  curl --silent --show-error --fail-with-body --no-buffer \
    -H "Authorization: Bearer ${API_KEY:--}" -H "Content-Type: application/json" "$@"
  echo
}

echo "== What is served"
ask "$url/info"

echo "== TGI: the whole answer at once"
ask "$url/generate" -d '{
  "inputs": "The capital of France is",
  "parameters": {"max_new_tokens": 16, "details": true}
}'

echo "== TGI: token by token"
ask "$url/generate_stream" -d '{
  "inputs": "The capital of France is",
  "parameters": {"max_new_tokens": 16, "do_sample": true, "temperature": 0.7, "seed": 42}
}'

echo "== OpenAI: a chat"
ask "$url/v1/chat/completions" -d '{
  "model": "",
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0,
  "max_tokens": 32
}'
