# Targets: cuda (the default), rocm, cpu and sagemaker. Container arguments are launcher flags:
#   docker build --target cpu --build-arg TORCH_INDEX=<PyTorch's index of CPU builds> -t pytgi .
#   docker run -p 8080:80 -v $PWD/data:/data pytgi --model-id Qwen/Qwen2.5-0.5B-Instruct
# docs/deployment.md has the arguments, and says which targets were run. The order of the stages is that of what is built
# most often: builders that don't skip stages stop at the target.

# Debian or Ubuntu with a python3 of 3.11 or newer that has venv, and its headers for the targets with Triton.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# libgomp1 runs the threads of the CPU kernels. Versions of Debian's packages leave its servers when newer ones come.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig \
 && mkdir -m 1777 /data
COPY --chmod=755 scripts/image/health.py /usr/local/bin/
# HF_HOME and PORT are those of TGI's images. Every compiled kernel is kept below XDG_CACHE_HOME.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    PORT=80
LABEL org.opencontainers.image.title="pytgi" \
      org.opencontainers.image.description="Text Generation Inference's interface for Qwen-family models, in pure Python" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /usr/src
EXPOSE 80
# A large model loads for minutes; failures count from then on.
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=3 CMD ["health.py"]
ENTRYPOINT ["text-generation-launcher"]

# The program as a wheel: the same for all targets, and nothing of the repository but what it installs.
FROM base AS wheel
WORKDIR /build
RUN python3 -m venv /opt/venv
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM base AS cpu-packages
WORKDIR /build
COPY pyproject.toml constraints.txt scripts/image/packages.sh ./
ARG TORCH_SPEC=
ARG TORCH_INDEX=
RUN sh packages.sh cpu

FROM base AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv
COPY scripts/image/program.sh /build/
RUN --mount=type=bind,from=wheel,source=/build/dist,target=/build/dist sh /build/program.sh compile
ARG GIT_SHA=
ARG DOCKER_LABEL=
ENV GIT_SHA=$GIT_SHA DOCKER_LABEL=$DOCKER_LABEL
LABEL org.opencontainers.image.revision=$GIT_SHA

FROM base AS gpu-base
# Triton compiles a launcher for each kernel when it first runs it, against Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig \
 && test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
ENV CC=gcc

FROM gpu-base AS rocm-packages
WORKDIR /build
COPY pyproject.toml constraints.txt scripts/image/packages.sh ./
ARG TORCH_SPEC=
ARG TORCH_INDEX=
RUN sh packages.sh hip

FROM gpu-base AS rocm
COPY --from=rocm-packages /opt/venv /opt/venv
COPY scripts/image/program.sh /build/
RUN --mount=type=bind,from=wheel,source=/build/dist,target=/build/dist sh /build/program.sh
ARG GIT_SHA=
ARG DOCKER_LABEL=
ENV GIT_SHA=$GIT_SHA DOCKER_LABEL=$DOCKER_LABEL
LABEL org.opencontainers.image.revision=$GIT_SHA

FROM gpu-base AS cuda-packages
WORKDIR /build
COPY pyproject.toml constraints.txt scripts/image/packages.sh ./
ARG TORCH_SPEC=
ARG TORCH_INDEX=
RUN sh packages.sh cuda

FROM gpu-base AS cuda-program
COPY --from=cuda-packages /opt/venv /opt/venv
COPY scripts/image/program.sh /build/
RUN --mount=type=bind,from=wheel,source=/build/dist,target=/build/dist sh /build/program.sh
ARG GIT_SHA=
ARG DOCKER_LABEL=
# What the NVIDIA runtime hands into the container, where it isn't asked for anything else.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GIT_SHA=$GIT_SHA DOCKER_LABEL=$DOCKER_LABEL
LABEL org.opencontainers.image.revision=$GIT_SHA

FROM cuda-program AS sagemaker
ENV PORT=8080
EXPOSE 8080
# How the launcher knows where it is.
CMD ["serve"]

FROM cuda-program AS cuda
