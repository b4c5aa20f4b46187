# syntax=docker/dockerfile:1
# The quantizer beside the engine that it measures with: vLLM's published image, and an environment of its own in
# /opt/tiercel, since the two need other versions of the same libraries. From the repository's root:
#   docker build --file deploy/containers/quantize.Dockerfile --tag tiercel/quantize:0.1.0 .
# Without a GPU: --build-arg ENGINE=vllm/vllm-openai-cpu:v0.32.0, and TORCH_INDEX for PyTorch's CPU wheels.
# A release pins its base: --build-arg ENGINE=vllm/vllm-openai:v0.32.0@sha256:…
ARG ENGINE=vllm/vllm-openai:v0.32.0

FROM ${ENGINE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/tiercel
ARG TORCH_INDEX=
RUN /opt/tiercel/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch==2.13.0
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY agents agents
COPY deploy deploy
COPY gateway gateway
COPY quantize quantize
# With the gateway's libraries: the command line reads its configuration.
RUN /opt/tiercel/bin/pip install --constraint deploy/constraints/product.txt ".[quantize,gateway]" ./agents

FROM ${ENGINE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tiercel quantizer" \
      org.opencontainers.image.description="Makes variants of a checkpoint, and measures and judges them on vLLM." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root may be read-only. There is no home, and torch asks for the user's name.
ENV PATH=/opt/tiercel/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=tiercel
RUN groupadd --gid 10001 tiercel \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tiercel \
 && install --directory --owner=10001 --group=10001 /run/tiercel /variants
COPY --from=build /opt/tiercel /opt/tiercel
USER 10001:10001
WORKDIR /run/tiercel
# Interrupted it says what is kept, and ends; the next run goes on from there.
STOPSIGNAL SIGINT
# A job: whoever runs it sees whether it ends well.
HEALTHCHECK NONE
ENTRYPOINT ["tiercel", "quantize"]
CMD ["--help"]
