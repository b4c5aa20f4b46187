# syntax=docker/dockerfile:1
# The gateway: without torch and vLLM. From the repository's root:
#   docker build --file deploy/containers/gateway.Dockerfile --tag tiercel/gateway:0.1.0 .
# A release pins its base: --build-arg PYTHON=python:3.11-slim-bookworm@sha256:…
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/tiercel
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY agents agents
COPY deploy deploy
COPY gateway gateway
COPY quantize quantize
# With PostgreSQL's driver: several gateways share what the watch knows.
RUN /opt/tiercel/bin/pip install --constraint deploy/constraints/product.txt ".[gateway,postgresql]" ./agents

FROM ${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Tiercel gateway" \
      org.opencontainers.image.description="Serves every agent at the precision it needs: the gateway." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root may be read-only: it writes to /run/tiercel and /tmp alone.
ENV PATH=/opt/tiercel/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN groupadd --gid 10001 tiercel \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tiercel \
 && install --directory --owner=10001 --group=10001 /run/tiercel
COPY --from=build /opt/tiercel /opt/tiercel
USER 10001:10001
WORKDIR /run/tiercel
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "gateway"]
CMD ["--config", "/etc/tiercel/tiercel.yaml"]
