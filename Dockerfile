# The web page in a container (docs/page.md). Checkpoints are mounted, never copied in:
#
#   docker build -t ai-images-detector .
#   docker run --rm -p 8501:8501 -v "$PWD/runs:/runs:ro" ai-images-detector
#
# The HTTP API (docs/api.md) is the same image with another command; docker-compose.yml has both.
# Mount the backbone of the detector that ships too, for a page without a run: -v "$HOME/.cache/ai-images-detector/backbones:/cache:ro"
# For an NVIDIA GPU: docker build --build-arg TORCH=cu130 ..., and docker run --gpus all ...
# Python 3.11.16, for amd64 and arm64; a newer one is a change of this line.
FROM python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

# What uv calls a PyTorch backend; torch and torchvision come from it as the pair that belongs together.
ARG TORCH=cpu

WORKDIR /srv
COPY pyproject.toml constraints.txt ./

# DALI decodes whole batches on a GPU, and is larger than everything else; the page takes one image
# at a time. `pipeline/loader.py` falls back to Pillow without it.
RUN pip install --no-cache-dir --constraint constraints.txt uv \
    && echo nvidia-dali-cuda120 > left-out.txt \
    && uv pip install --system --no-cache --compile-bytecode --torch-backend "${TORCH}" \
        --constraint constraints.txt --excludes left-out.txt \
        --requirements pyproject.toml --extra app --extra evidence --extra heatmap --extra serve \
    && rm left-out.txt \
    && useradd --create-home --uid 10001 page \
    && install --directory --owner page /cache /runs

COPY installed.py console.py escape.py storage.py app.py app_server.py ./
COPY recipes/ recipes/
COPY imaging/ imaging/
COPY sharding/ sharding/
COPY pipeline/ pipeline/
COPY model/ model/
COPY serve/ serve/
COPY page/ page/
COPY detectors/ detectors/
COPY .streamlit/ .streamlit/
# A checkout keeps the modes that its umask gave, and COPY keeps them for root.
RUN chmod -R a+rX .

USER 10001
ENV DETECTOR_RUNS=/runs DETECTOR_CACHE=/cache PYTHONDONTWRITEBYTECODE=1
EXPOSE 8501 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
CMD ["streamlit", "run", "app_server.py", "--server.address", "0.0.0.0"]
