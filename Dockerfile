# On a CPU:  docker build -t accumexp . && docker run --rm -v "$PWD/work:/work" accumexp run accum.steps=4
# On a GPU:  docker build -t accumexp --build-arg TORCH=cu132 . && docker run --rm --gpus all -v "$PWD/work:/work" accumexp run
FROM python:3.13-slim

# The wheels of torch, as in https://download.pytorch.org/whl/<TORCH>.
ARG TORCH=cpu
ARG EXTRAS=text

WORKDIR /accumexp
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch torchvision --index-url https://download.pytorch.org/whl/${TORCH}
COPY pyproject.toml README.md LICENSE ./
COPY accumexp accumexp
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

# outputs/, multirun/, data/ and mlflow.db are written here.
WORKDIR /work
ENTRYPOINT ["sh", "-c", "command=$1; shift; exec python -m accumexp.$command \"$@\"", "accumexp"]
CMD ["run", "--help"]
