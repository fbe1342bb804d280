"""The table of the launcher's flags and variables: name, value, default, the field it fills, and what it does here.

Every flag of TGI's launcher is a row. The parser, `--help`, docs/configuration.md, the processes' configurations and
the tests are made from this table. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

from server.launcher.flag import (
    BOOLEAN,
    COUNT,
    DRAFT,
    DURATION,
    FACTOR,
    FRACTION,
    HEADER_TEXT,
    INTEGERS,
    LOG_FILTER,
    MAX_DRAFT_TOKENS,
    NAMES,
    NUMBER,
    PATH,
    PORT,
    POSITIVE,
    ROUTE,
    SECONDS,
    SECRET,
    TEXT,
    THREADS,
    Effect,
    Flag,
    Variable,
)

QUANTIZE = ("auto-round", "awq", "compressed-tensors", "eetq", "fp8", "gguf", "gptq", "int4", "int8")
QUANTIZE_STAND_INS = {"bitsandbytes": "int8", "bitsandbytes-fp4": "int4", "bitsandbytes-nf4": "int4"}
QUANTIZE_OF_TGI = ("exl2", "marlin")
"""TGI's methods that are refused. The flag's reason says what to do instead."""

MODEL = (
    Flag(
        name="model-id",
        fills="launcher.model_id server.model_id",
        help="Folder of a Hugging Face model, its id on the Hub, a GGUF file or a folder with one (ours), or "
        "gs://BUCKET/FOLDER in Google's Cloud Storage (ours); an adapter (LoRA) is merged into the model that it names",
    ),
    Flag(
        name="served-model-name",
        fills="server.served_model_names",
        help="What clients call the model (default: --model-id), one name or several between commas: /v1/models lists "
        "all of them, answers have the first where a request names none (ours)",
        value=NAMES,
    ),
    Flag(name="revision", fills="launcher.revision", help="Branch, tag or commit on the Hub (default: main)"),
    Flag(
        name="device",
        fills="engine.device sharding",
        help="What to compute on; auto is a GPU if torch sees one, else the CPU. interpreted is for tests: the GPU's "
        "kernels run in Python (ours)",
        choices=tuple("auto cuda cpu interpreted".split()),
        default="auto",
    ),
    Flag(
        name="dtype",
        fills="engine.dtype",
        help="What to compute in; auto is the checkpoint's own on a CPU, on a GPU bfloat16, or float16 on cards "
        "without it. float32 gives the ids of transformers in float32. On a CPU activations are float32; asked for by "
        "name, bfloat16 rounds them too where the processor has AVX-512, which is faster",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
    ),
    Flag(
        name="quantize",
        fills="engine.quantize",
        help="awq, gptq, compressed-tensors, fp8, auto-round and gguf load such a checkpoint (also without the flag); "
        "eetq and int8 (8 bits) and int4 quantise a dense one while it loads; bitsandbytes is served as int8, "
        "bitsandbytes-nf4 and -fp4 as int4, unless --strict-tgi is given, which refuses them",
        choices=(*QUANTIZE, *QUANTIZE_STAND_INS, *QUANTIZE_OF_TGI),
        refused_choices=QUANTIZE_OF_TGI,
        stand_ins=QUANTIZE_STAND_INS,
        reason=f"serve a checkpoint in another format; {', '.join(QUANTIZE)} are supported",
    ),
    Flag(
        name="quantize-head",
        fills="engine.quantize_head",
        help="How a dense output head runs (ours; default: int8 where the rest is quantised, unless dtype is float32)",
        choices=("none", "int8", "int4"),
    ),
    Flag(
        name="rope-scaling",
        fills="engine.rope_scaling",
        help="How rotary positions are stretched, in place of what config.json says; --rope-factor alone means linear",
        choices=("default", "linear", "dynamic", "llama3", "yarn"),
    ),
    Flag(
        name="rope-factor",
        fills="engine.rope_factor",
        help="By how much rotary positions are stretched (default: 1)",
        value=FACTOR,
    ),
    Flag(
        name="sharded",
        fills="sharding",
        help="Whether the model is cut over several shards; true alone takes all visible devices",
        value=BOOLEAN,
    ),
    Flag(
        name="num-shard",
        fills="sharding",
        help="How many shards the model is cut into, a process each, on all hosts together (default: the visible "
        "devices, on a CPU 1)",
        value=COUNT,
    ),
    Flag(
        name="nnodes",
        fills="sharding",
        help="Over how many hosts the shards are spread evenly (ours)",
        value=POSITIVE,
        default=1,
    ),
    Flag(
        name="node-rank",
        fills="sharding",
        help="Which of the hosts this one is, from 0; the first serves HTTP (ours)",
        value=COUNT,
        default=0,
    ),
    Flag(
        name="shard-secret",
        fills="engine.shard_secret",
        help="Text by which the shards of several hosts know each other; better given as variable, a command line is "
        "seen by every user of the host (ours; default: on one host a new one for each start)",
        value=SECRET,
        is_secret=True,
    ),
    Flag(
        name="shard-timeout",
        fills="engine.shard_timeout_s launcher.shard_timeout_s",
        help="Seconds after which a silent shard counts as hung and the server ends (ours)",
        value=POSITIVE,
        default=15,
    ),
    Flag(
        name="speculate",
        fills="engine.max_draft_tokens",
        help="Longest draft of n-gram speculation: up to so many tokens are guessed and checked in one step when that "
        f"pays, at most {MAX_DRAFT_TOKENS}; the output stays the same (default: 0, none)",
        value=DRAFT,
    ),
    Flag(
        name="speculative-decoding",
        fills="engine.max_draft_tokens",
        help="Other name of --speculate, in Qwen's documents",
        value=DRAFT,
    ),
    Flag(
        name="kv-cache-dtype",
        help="Type of cached keys and values",
        choices=("fp8_e4m3fn", "fp8_e5m2"),
        effect=Effect.REFUSED,
        reason="keys and values are kept in 16 bits (float32 with --dtype float32), start without it",
    ),
    Flag(
        name="lora-adapters",
        fills="launcher.lora_adapters",
        help="Adapters (LoRA) beside the model, between commas: a folder or an id on the Hub, NAME=SOURCE to give it a "
        "name, SOURCE@REVISION. Requests choose one as adapter_id, or as model on OpenAI's routes",
    ),
    Flag(
        name="max-loras",
        fills="engine.max_loras",
        help="Adapters in memory at a time; the least recently used makes place for another (ours)",
        value=POSITIVE,
        default=8,
    ),
    Flag(
        name="max-lora-rank",
        fills="engine.max_lora_rank",
        help="Largest rank of an adapter (ours; default: that of the largest of --lora-adapters, 16 without any)",
        value=POSITIVE,
    ),
    Flag(
        name="allow-runtime-lora-updating",
        fills="engine.is_lora_updating server.is_lora_updating",
        help="Let POST /v1/load_lora_adapter and /v1/unload_lora_adapter change the adapters while it serves: whoever "
        "may send requests then names folders of this host (ours)",
        is_switch=True,
    ),
    Flag(
        name="huggingface-hub-cache",
        fills="launcher.huggingface_hub_cache",
        help="Folder where models of the Hub are kept",
        value=PATH,
    ),
    Flag(
        name="weights-cache-override",
        help="Folder with the weight files",
        value=PATH,
        effect=Effect.NONE,
        reason="give that folder, with config.json and tokenizer.json in it, as --model-id",
    ),
    Flag(
        name="trust-remote-code",
        help="Run code from the model's repository",
        is_switch=True,
        effect=Effect.NONE,
        reason="no code of a repository is ever run, and Qwen2 needs none",
    ),
    Flag(
        name="disable-custom-kernels",
        help="Leave custom kernels out",
        is_switch=True,
        effect=Effect.NONE,
        reason="TGI has such kernels for BLOOM and NeoX only",
    ),
)

REQUESTS = (
    Flag(
        name="max-concurrent-requests",
        fills="server.max_concurrent_requests",
        help="Requests waiting and running together; more get 429",
        value=POSITIVE,
        default=128,
    ),
    Flag(
        name="max-input-tokens",
        fills="engine.max_input_tokens",
        help="Longest prompt in tokens (default: max-total-tokens - 1)",
        value=POSITIVE,
    ),
    Flag(
        name="max-input-length", fills="engine.max_input_tokens", help="Old name of --max-input-tokens", value=POSITIVE
    ),
    Flag(
        name="max-total-tokens",
        fills="engine.max_total_tokens",
        help="Longest prompt and output together, in tokens (default: what model and memory allow)",
        value=POSITIVE,
    ),
    Flag(
        name="max-best-of", fills="server.max_best_of", help="Largest best_of of a request", value=POSITIVE, default=2
    ),
    Flag(
        name="max-stop-sequences",
        fills="server.max_stop_sequences",
        help="Most stop strings of a request",
        value=COUNT,
        default=4,
    ),
    Flag(
        name="max-top-n-tokens",
        fills="server.max_top_n_tokens",
        help="Largest top_n_tokens, and without --strict-tgi at least 20 for the likeliest tokens of OpenAI's routes",
        value=COUNT,
        default=5,
    ),
    Flag(
        name="max-logit-bias",
        fills="server.max_logit_bias",
        help="Most tokens in the logit_bias of a request (ours)",
        value=COUNT,
        default=1024,
    ),
    Flag(
        name="max-client-batch-size",
        fills="server.max_client_batch_size",
        help="Most prompts in one call of /v1/completions; more are refused. Without it as many as "
        "--max-concurrent-requests, with --strict-tgi 4",
        value=POSITIVE,
    ),
    Flag(
        name="payload-limit",
        fills="server.payload_limit",
        help="Largest request body in bytes; more gets 413",
        value=POSITIVE,
        default=2_000_000,
    ),
    Flag(
        name="validation-workers",
        fills="server.validation_workers",
        help="Threads that tokenize prompts",
        value=COUNT,
        default=2,
    ),
    Flag(
        name="reasoning-parser",
        fills="server.reasoning_parser",
        help="How thoughts are told from answers in chats: auto looks whether the model knows <think>; deepseek_r1 "
        "takes all for a thought until </think>, also where nothing has begun one; with --strict-tgi it is off (ours)",
        choices=("auto", "off", "qwen3", "deepseek_r1"),
        default="auto",
    ),
    Flag(
        name="tokenizer-config-path",
        fills="server.tokenizer_config_path",
        help="File read in place of the model's tokenizer_config.json, e.g. for another chat template",
        value=PATH,
    ),
    Flag(
        name="generation-config",
        fills="server.generation_config",
        help="Whether temperature, top_p, top_k, min_p and repetition_penalty of the model's generation_config.json "
        "are the defaults of OpenAI's routes: auto, unless --strict-tgi is given; none, or vllm as vLLM has it, turns "
        "that off (ours)",
        choices=("auto", "none", "vllm"),
        default="auto",
    ),
    Flag(
        name="disable-grammar-support",
        fills="server.is_grammar_disabled engine.is_grammar_disabled",
        help="Refuse grammars and response formats with TGI's text, and spare the memory that they need",
        is_switch=True,
    ),
    Flag(
        name="enable-prefill-logprobs",
        fills="server.has_prompt_logprobs",
        help="Let requests ask for logprobs of their prompt (needed with --strict-tgi only)",
        is_switch=True,
    ),
)

BATCHING = (
    Flag(
        name="max-batch-prefill-tokens",
        fills="engine.max_batch_prefill_tokens",
        help="Most tokens computed, and requests running, in one step (default: 4096)",
        value=POSITIVE,
    ),
    Flag(
        name="max-batch-total-tokens",
        fills="engine.max_batch_total_tokens",
        help="Tokens that the KV cache holds (default: from the free memory)",
        value=POSITIVE,
    ),
    Flag(
        name="max-batch-size",
        fills="engine.max_batch_size",
        help="Most requests that run at a time (default: 256 on a GPU, no limit of its own on a CPU)",
        value=COUNT,
    ),
    Flag(
        name="target-inter-token-latency",
        fills="engine.target_inter_token_latency_s",
        help="Seconds that a step is planned to take at most while several requests are there, so that streams get "
        "their next token in time; 0 sets no target (ours; default: 0.25 on a CPU, and 4 times a step without prompts; "
        "while few prompts wait 2.5 times, or 0.065 if that is longer; none on a GPU)",
        value=DURATION,
    ),
    Flag(
        name="cuda-memory-fraction",
        fills="engine.memory_fraction",
        help="Share of each GPU's memory that may be used; on a CPU, of the memory that is free",
        value=FRACTION,
        default=1.0,
    ),
    Flag(
        name="cuda-graphs",
        fills="engine.graph_sizes",
        help="Rows of decoding steps that a GPU runs as CUDA graphs, the tokens of drafts included; 0 captures none "
        "(default: 1,2,4,8,16,32, at most 512; no effect on a CPU)",
        value=INTEGERS,
    ),
    Flag(
        name="disable-overlap",
        fills="engine.is_overlap_disabled",
        help="Read the tokens of each step on a GPU before the next one is launched (no effect on a CPU or with "
        "speculation, where steps don't overlap)",
        is_switch=True,
    ),
    Flag(
        name="waiting-served-ratio",
        help="When waiting prompts interrupt decoding",
        value=NUMBER,
        effect=Effect.NONE,
        reason="prompts join the running batch at every step",
    ),
    Flag(
        name="max-waiting-tokens",
        help="Decoding steps before waiting prompts are let in",
        value=COUNT,
        effect=Effect.NONE,
        reason="prompts join the running batch at every step",
    ),
)

SERVING = (
    Flag(name="hostname", fills="launcher.hostname", help="IP address to listen on", default="0.0.0.0"),
    Flag(
        name="port",
        fills="launcher.port",
        short="p",
        help="Port to listen on; 0 takes a free one",
        value=PORT,
        default=3000,
    ),
    Flag(
        name="api-key",
        fills="server.api_key",
        help="Key that requests must carry as `Authorization: Bearer KEY`; better given as variable, "
        "a command line is seen by every user of the host",
        value=SECRET,
        is_secret=True,
    ),
    Flag(
        name="cors-allow-origin",
        fills="server.cors_allow_origin",
        help="Origin of web pages that may call the server (default: any); can be given several times",
        is_repeatable=True,
    ),
    Flag(
        name="graceful-termination-timeout",
        fills="launcher.graceful_termination_timeout_s server.graceful_termination_timeout_s",
        short="g",
        help="Seconds that running requests have to end after a signal",
        value=SECONDS,
        default=90,
    ),
    Flag(
        name="disable-ui",
        fills="server.is_ui_disabled",
        help="Give browsers no pages: / answers them as it answers everybody, /ui and /dashboard are not there (ours)",
        is_switch=True,
    ),
    Flag(
        name="strict-tgi",
        fills="server.is_strict_tgi engine.is_strict_tgi",
        help="Behave as TGI also where that breaks clients (ours; TGI doesn't have it)",
        is_switch=True,
    ),
    Flag(
        name="shard-uds-path",
        help="Where TGI's shards put their sockets",
        value=PATH,
        effect=Effect.NONE,
        reason="the processes talk over inherited socket pairs, nothing lies in the file system",
    ),
    Flag(
        name="master-addr",
        fills="sharding",
        help="Address of the first host where the shards meet; they listen there and nowhere else (default: 127.0.0.1)",
    ),
    Flag(
        name="master-port",
        fills="sharding",
        help="Port where the shards meet (default: 29500 with several hosts, else a free one)",
        value=PORT,
    ),
    Flag(
        name="prometheus-port",
        help="Port of the metrics",
        value=PORT,
        effect=Effect.NONE,
        reason="metrics are at /metrics on the same port as all other routes, as with TGI",
    ),
    Flag(
        name="ngrok",
        help="Open a tunnel",
        is_switch=True,
        effect=Effect.REFUSED,
        reason="put a reverse proxy in front of the server",
    ),
    Flag(
        name="ngrok-authtoken",
        help="Token of the tunnel",
        is_secret=True,
        effect=Effect.NONE,
        reason="no tunnel is opened",
    ),
    Flag(
        name="ngrok-edge",
        help="Edge of the tunnel",
        effect=Effect.NONE,
        reason="no tunnel is opened",
    ),
)

LOGS = (
    Flag(
        name="json-output",
        fills="engine.is_json_output launcher.is_json_output server.is_json_output",
        help="Write the log as JSON lines",
        is_switch=True,
    ),
    Flag(
        name="env",
        fills="launcher.is_runtime_logged",
        short="e",
        help="Log versions and hardware first, for bug reports; the server starts all the same",
        is_switch=True,
        has_variable=False,
    ),
    Flag(
        name="otlp-endpoint",
        fills="server.otlp_endpoint",
        help="OpenTelemetry collector that gets traces over gRPC, http://HOST:4317 (default: no traces)",
    ),
    Flag(
        name="otlp-service-name",
        fills="server.otlp_service_name",
        help="Name of this server in traces",
        default="text-generation-inference.router",
    ),
    Flag(
        name="usage-stats",
        help="What TGI reports to its makers",
        choices=("on", "off", "no-stack"),
        effect=Effect.NONE,
        harmless=("off",),
        reason="nothing is ever reported to anybody",
    ),
    Flag(
        name="watermark-gamma",
        fills="engine.watermark_gamma",
        help="Share of the vocabulary on the watermark's green list",
        value=FRACTION,
        default=0.5,
    ),
    Flag(
        name="watermark-delta",
        fills="engine.watermark_delta",
        help="How much the logits of the watermark's green list are raised",
        value=NUMBER,
        default=2.0,
    ),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "Model and weights": MODEL,
    "Limits on requests": REQUESTS,
    "Batching and memory": BATCHING,
    "Serving and security": SERVING,
    "Logs, telemetry, watermark": LOGS,
}

VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="PREFIX_CACHING",
        fills="engine.is_prefix_caching",
        value=BOOLEAN,
        default=True,
        help="0 computes every prompt anew instead of reusing KV",
    ),
    Variable(
        name="TGI_WIGGLE_ROOM",
        fills="engine.kv_memory_share",
        value=FRACTION,
        help="Share of the memory free after loading that the KV cache may take (default: 0.8; on a GPU 0.95 of what "
        "the largest step leaves)",
    ),
    Variable(
        name="OMP_NUM_THREADS",
        fills="launcher.omp_num_threads",
        value=THREADS,
        help="Threads that compute (default: all cores we may use)",
    ),
    Variable(
        name="RANK", fills="sharding", value=COUNT, help="Set by torchrun: the one shard that this launcher starts"
    ),
    Variable(name="WORLD_SIZE", fills="sharding", value=POSITIVE, help="Set by torchrun: how many shards there are"),
    Variable(
        name="LOCAL_RANK", fills="sharding", value=COUNT, default=0, help="Set by torchrun: which device of the host"
    ),
    Variable(
        name="LOCAL_WORLD_SIZE",
        fills="sharding",
        value=POSITIVE,
        help="Set by torchrun: how many shards share the host",
    ),
    Variable(
        name="COMPUTE_TYPE",
        fills="server.compute_type",
        value=HEADER_TEXT,
        help="Text of the x-compute-type header (default: cpu or the card)",
    ),
    Variable(name="GIT_SHA", fills="server.build_sha", value=TEXT, help="Set by our images: the `sha` of /info"),
    Variable(
        name="DOCKER_LABEL",
        fills="server.docker_label",
        value=TEXT,
        help="Set by our images: the `docker_label` of /info",
    ),
    Variable(
        name="LOG_LEVEL",
        fills="engine.log_level launcher.log_level server.log_level",
        value=LOG_FILTER,
        default="info",
        help="debug, info (default), warn, error, or a filter by module like warn,text_generation_router=debug",
    ),
    Variable(
        name="LOG_COLORIZE", help="1 colours the log, 0 doesn't (TGI has it inverted; default: only on a terminal)"
    ),
    Variable(name="HF_TOKEN", help="Token for private and gated models of the Hub"),
    Variable(name="HUGGING_FACE_HUB_TOKEN", help="The same, read when HF_TOKEN is not set"),
    Variable(name="HF_API_TOKEN", help="The same, read when HF_TOKEN is not set"),
    Variable(name="HF_HOME", help="Parent of the model cache (the cache is its subfolder hub)"),
    Variable(name="HF_HUB_OFFLINE", help="1 makes no network call: only what is in the cache is served"),
    Variable(name="HF_ENDPOINT", help="Address of another Hub"),
    Variable(name="STORAGE_EMULATOR_HOST", help="Address of another storage for gs://, as Google's libraries read it"),
    Variable(name="GCE_METADATA_HOST", help="Host of another metadata server, which hands out the token for gs://"),
    Variable(
        name="AIP_PREDICT_ROUTE",
        fills="server.predict_route",
        value=ROUTE,
        help="Set by Vertex AI: a further path of /vertex, unless it is a route of ours",
    ),
    Variable(
        name="AIP_HEALTH_ROUTE",
        fills="server.health_route",
        value=ROUTE,
        help="Set by Vertex AI: a further path of /health, unless it is a route of ours",
    ),
    Variable(name="ATTENTION", value=TEXT, effect=Effect.NONE, help="the attention kernel follows from the device"),
    Variable(
        name="USE_FLASH_ATTENTION",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="the attention kernel follows from the device",
    ),
    Variable(
        name="PREFILL_CHUNKING",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="long prompts are always computed in chunks",
    ),
    Variable(
        name="MESSAGES_API_ENABLED",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="the routes under /v1 are always there",
    ),
)


def every_flag() -> Iterator[Flag]:
    for flags in SECTIONS.values():
        yield from flags
