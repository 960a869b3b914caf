# The web page in a container (docs/page.md). Checkpoints are mounted, never copied in:
#
#   docker build -t ai-images-detector .
#   docker run --rm -p 8501:8501 -v "$PWD/runs:/runs:ro" ai-images-detector
#
# The HTTP API (docs/api.md) is the same image with another command; docker-compose.yml has both.
# The detector that ships needs no run, only its backbone: -v "$HOME/.cache/ai-images-detector/backbones:/cache:ro"
# For an NVIDIA GPU: docker build --build-arg TORCH=cu132 ..., and docker run --gpus all ...
# The digest is Python 3.11.16 for amd64 and arm64.
FROM python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

# PyTorch backend of uv, which selects matching versions of torch and torchvision.
ARG TORCH=cpu

WORKDIR /srv
COPY pyproject.toml constraints.txt ./

# DALI is left out: it is larger than everything else, and only useful for batches on a GPU. Without
# it `pipeline/loader.py` uses Pillow.
RUN pip install --no-cache-dir --constraint constraints.txt uv \
    && echo nvidia-dali-cuda120 > left-out.txt \
    && uv pip install --system --no-cache --compile-bytecode --torch-backend "${TORCH}" \
        --constraint constraints.txt --excludes left-out.txt \
        --requirements pyproject.toml --extra app --extra evidence --extra heatmap --extra serve \
    && rm left-out.txt \
    && useradd --create-home --uid 10001 page \
    && install --directory --owner page /cache /runs

COPY installed.py devices.py checked.py console.py cli.py interrupts.py escape.py locks.py storage.py web_addresses.py app.py app_server.py ./
COPY recipes/ recipes/
COPY imaging/ imaging/
COPY sharding/ sharding/
COPY pipeline/ pipeline/
COPY model/ model/
COPY serve/ serve/
COPY page/ page/
COPY detectors/ detectors/
COPY .streamlit/ .streamlit/
# COPY keeps the file modes of the checkout, which a strict umask makes unreadable for other users.
RUN chmod -R a+rX .

USER 10001
ENV DETECTOR_RUNS=/runs DETECTOR_CACHE=/cache PYTHONDONTWRITEBYTECODE=1
EXPOSE 8501 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
CMD ["streamlit", "run", "app_server.py", "--server.address", "0.0.0.0"]
