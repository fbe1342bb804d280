# Targets: cpu (default) and cuda. The launcher is PID 1, so container arguments are launcher flags:
#   docker build --target cpu -t pytgi . && docker run -p 8080:80 -v $PWD/data:/data pytgi --model-id Qwen/Qwen2.5-0.5B-Instruct
# Not built where it was written: there was no Docker engine.

FROM python:3.11-slim AS base
# libgomp1: Numba's OpenMP layer. gcc: Triton compiles a small launcher at run time.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /usr/src
COPY constraints.txt ./
ENV HF_HOME=/data PORT=80 PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/data/cache
ENTRYPOINT ["text-generation-launcher"]

FROM base AS cuda
RUN pip install "torch==2.13.0"
COPY . .
RUN pip install -c constraints.txt ".[cuda]"

FROM base AS cpu
# Point PIP_EXTRA_INDEX_URL at an index of CPU wheels, or torch comes as a CUDA build of several GB.
ARG TORCH_SPEC="torch==2.13.0"
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install "$TORCH_SPEC"
COPY . .
RUN pip install -c constraints.txt .
