# Targets: `api` (no PyTorch; also runs the ingest worker and migrations), `worker-cpu`, `worker-cuda`.
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH KINDRED_DATA_DIR=/data
# A new volume takes its owner from this folder.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin kindred \
    && install --directory --owner kindred --group kindred /data \
    && python3 -m venv /opt/venv
WORKDIR /opt/kindred

# Packages before code, which changes more often: a change of code installs nothing again.
FROM base AS api-packages
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; whole = tomllib.load(open("pyproject.toml", "rb")); \
        print(*whole["build-system"]["requires"], *whole["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt

FROM api-packages AS train-packages
# PyTorch's wheel in the default index carries CUDA. For a smaller image without a GPU:
# --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=
RUN python3 -c 'import tomllib; whole = tomllib.load(open("pyproject.toml", "rb")); \
        print(*whole["project"]["optional-dependencies"]["train"], sep="\n")' \
        > /tmp/requirements.txt \
    && pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --requirement /tmp/requirements.txt

FROM api-packages AS api
COPY . .
RUN pip install --no-deps --no-build-isolation --editable .
USER kindred
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--no-server-header", "--timeout-graceful-shutdown", "20"]

FROM train-packages AS worker-cpu
COPY . .
RUN pip install --no-deps --no-build-isolation --editable .
USER kindred
VOLUME /data
# The worker's process is there and neither stopped nor a zombie. `celery inspect ping` would start a Python every
# time and turn red when the broker is away, which running work must not notice; whether a worker gets on with its
# work is what the leases in the database say.
HEALTHCHECK --interval=30s --timeout=3s --start-period=20s CMD grep -Eqs '\(celery\) [SRD]' /proc/[0-9]*/stat
CMD ["celery", "-A", "worker.celery_app", "worker", "-Q", "train", "-P", "threads", "-c", "1", "-n", "train@%h", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]

FROM worker-cpu AS worker-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
